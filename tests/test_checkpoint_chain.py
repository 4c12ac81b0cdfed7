"""A run of a plain optimizer goes on with F-SAM in front, and back."""

from flax import nnx
from flax import serialization
import jax
from jax import numpy as jnp
import numpy as np
import optax
from oracle import LeastSquares
import pytest
from versions import as_pure

import fsam_optax
from fsam_optax import checkpoint

RHO, LEARNING_RATE, DECAY = 0.1, 1e-2, 1e-4
ADAMW = optax.adamw(LEARNING_RATE, weight_decay=DECAY)
# The same, spelled out as the links of one flat chain.
LINKS = (
  optax.scale_by_adam(),
  optax.add_decayed_weights(DECAY),
  optax.scale_by_learning_rate(LEARNING_RATE),
)
FSAM = fsam_optax.fsam(rho=RHO)

# The chain to go on with, and the optimizer before.
CHAINS = {
  "nested": (optax.chain(FSAM, ADAMW), ADAMW),
  "flat": (optax.chain(FSAM, *LINKS), optax.chain(*LINKS)),
  # What adamw returns is a chain of these links.
  "flattened": (optax.chain(FSAM, *LINKS), ADAMW),
  "behind clipping": (
    optax.chain(FSAM, optax.clip_by_global_norm(10.0), *LINKS),
    optax.chain(optax.clip_by_global_norm(10.0), *LINKS),
  ),
  "scheduled": (
    optax.chain(FSAM, optax.inject_hyperparams(optax.adamw)(LEARNING_RATE)),
    optax.inject_hyperparams(optax.adamw)(LEARNING_RATE),
  ),
}
chains = pytest.mark.parametrize(("tx", "old"), CHAINS.values(), ids=CHAINS)


@pytest.fixture(scope="module")
def batches():
  draw = np.random.default_rng(0).normal
  return [(draw(size=(8, 4)), draw(size=8)) for _ in range(5)]


def loss_fn(params, batch):
  x, y = batch
  return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


grad_fn = jax.jit(jax.grad(loss_fn))


def start():
  return {"w": jnp.asarray([0.5, -1.0, 2.0]), "b": jnp.asarray([0.25])}


def with_bias(batch):
  """The batch as the oracle takes it: the constant column is the bias."""
  x, y = batch
  return np.concatenate([np.ones((len(y), 1)), x[:, :3]], axis=1), y


def train(tx, params, opt_state, batches):
  for x, y in batches:
    grads = grad_fn(params, (x[:, :3], y))
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
  return params, opt_state


def chained(tx, params, opt_state, batch):
  of_batch = lambda p: grad_fn(p, (batch[0][:, :3], batch[1]))
  updates, opt_state = tx.update(
    of_batch(params), opt_state, params, grad_fn=of_batch
  )
  return optax.apply_updates(params, updates), opt_state


def assert_same(found, expected):
  """The same leaves in the same order, bit for bit."""
  found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
  assert len(found) == len(expected)
  for x, y in zip(found, expected, strict=True):
    assert jnp.result_type(x) == jnp.result_type(y)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def adam_state(opt_state):
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  (found,) = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))
  return found


def adamw_by_hand(weights, gradient, state):
  """The step of AdamW from the moments of a state, in NumPy."""
  of_vector = lambda tree: np.concatenate(
    [np.asarray(tree[name], np.float64) for name in ("b", "w")]
  )
  t = int(state.count) + 1
  mean = 0.9 * of_vector(state.mu) + 0.1 * gradient
  square = 0.999 * of_vector(state.nu) + 0.001 * gradient**2
  step = (mean / (1 - 0.9**t)) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
  return weights - LEARNING_RATE * (step + DECAY * weights)


@chains
def test_the_old_state_goes_on_bit_for_bit_behind_a_fresh_link(
  tx, old, batches
):
  params, before = train(old, start(), old.init(start()), batches[:3])
  state = checkpoint.into_chain(before, tx, params)
  assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
  assert_same(state[1:], before)
  assert_same(state[0], FSAM.init(params))
  assert int(adam_state(state).count) == 3


@chains
def test_the_first_step_is_fsam_by_hand_on_the_old_moments(tx, old, batches):
  params, before = train(old, start(), old.init(start()), batches[:3])
  state = checkpoint.into_chain(before, tx, params)
  moved, state = chained(tx, params, state, batches[3])

  weights = np.concatenate([np.asarray(params[k], float) for k in ("b", "w")])
  batch = with_bias(batches[3])
  gradient = LeastSquares.gradient(weights, batch)
  epsilon = RHO * gradient / np.linalg.norm(gradient)
  second = LeastSquares.gradient(weights + epsilon, batch)
  expected = adamw_by_hand(weights, second, adam_state(before))
  np.testing.assert_allclose(
    np.concatenate([moved["b"], moved["w"]]), expected, rtol=1e-5
  )
  assert int(adam_state(state).count) == 4


@chains
def test_back_out_the_optimizer_goes_on_alone(tx, old, batches):
  params, before = train(old, start(), old.init(start()), batches[:3])
  state = checkpoint.into_chain(before, tx, params)
  assert_same(checkpoint.out_of_chain(state, old, params), before)
  params, state = chained(tx, params, state, batches[3])
  after = checkpoint.out_of_chain(state, old, params)
  assert jax.tree.structure(after) == jax.tree.structure(old.init(params))
  assert_same(adam_state(after), adam_state(state))
  _, after = train(old, params, after, batches[4:])
  assert int(adam_state(after).count) == 5


def test_what_flax_serialized_goes_on_by_the_documented_lines(batches):
  params, before = train(ADAMW, start(), ADAMW.init(start()), batches[:3])
  tx = optax.chain(FSAM, ADAMW)
  saved = serialization.to_bytes(before)
  restored = serialization.from_bytes(ADAMW.init(params), saved)
  state = checkpoint.into_chain(restored, tx, params)
  assert_same(state[1], before)
  chained(tx, params, state, batches[3])


class Network(nnx.Module):
  def __init__(self):
    self.w, self.b = (nnx.Param(start()[name]) for name in ("w", "b"))


def nnx_loss(model, batch):
  return loss_fn({"w": model.w[...], "b": model.b[...]}, batch)


@pytest.mark.parametrize("name", ["nested", "flat"])
def test_an_nnx_optimizer_goes_on_and_back(name, batches):
  tx, old_tx = CHAINS[name]
  model = Network()
  old = nnx.Optimizer(model, old_tx, wrt=nnx.Param)
  for x, y in batches[:3]:
    old.update(model, nnx.grad(nnx_loss)(model, (x[:, :3], y)))
  params = start()
  expected, before = train(old_tx, params, old_tx.init(params), batches[:3])
  optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
  structure = jax.tree.structure(nnx.state(optimizer))
  optimizer.step = old.step
  variables = nnx.state(model, nnx.Param)
  optimizer.opt_state = checkpoint.into_chain(old.opt_state, tx, variables)
  assert jax.tree.structure(nnx.state(optimizer)) == structure

  x, y = batches[3]
  batch = (x[:, :3], y)
  fn = fsam_optax.nnx.value_and_grad(nnx_loss)
  _, grads, second = fn(model, batch)
  optimizer.update(model, grads, grad_fn=second)
  assert int(optimizer.step[...]) == 4
  assert int(adam_state(as_pure(optimizer.opt_state)).count) == 4
  weights = np.concatenate([np.asarray(expected[k], float) for k in ("b", "w")])
  whole = with_bias(batches[3])
  gradient = LeastSquares.gradient(weights, whole)
  perturbed = weights + RHO * gradient / np.linalg.norm(gradient)
  by_hand = adamw_by_hand(
    weights, LeastSquares.gradient(perturbed, whole), adam_state(before)
  )
  np.testing.assert_allclose(
    np.concatenate([model.b[...], model.w[...]]), by_hand, rtol=1e-5
  )

  again = nnx.Optimizer(model, old_tx, wrt=nnx.Param)
  structure = jax.tree.structure(nnx.state(again))
  again.opt_state = checkpoint.out_of_chain(
    optimizer.opt_state, old_tx, nnx.state(model, nnx.Param)
  )
  assert jax.tree.structure(nnx.state(again)) == structure
  again.update(model, nnx.grad(nnx_loss)(model, batch))
  assert int(adam_state(as_pure(again.opt_state)).count) == 5


# What goes in, and what the error names.
MISFITS = {
  "another optimizer": (
    lambda p: optax.sgd(0.1, momentum=0.9).init(p),
    r"missing in `opt_state`: 0\.count, 0\.mu\.b, .*missing in that of `tx`: "
    r"0\.trace\.b",
  ),
  "other shapes": (
    lambda p: ADAMW.init({**p, "w": jnp.ones(7)}),
    r"of another shape or dtype: 0\.mu\.w \(got float32\[7\], `tx` "
    r"float32\[3\]\), 0\.nu\.w",
  ),
  "another dtype": (
    lambda p: optax.adamw(0.1, mu_dtype=jnp.bfloat16).init(p),
    r"0\.mu\.b \(got bfloat16\[1\], `tx` float32\[1\]\)",
  ),
  "a further weight": (
    lambda p: ADAMW.init({**p, "c": jnp.ones(1)}),
    r"got missing in that of `tx`: 0\.mu\.c, 0\.nu\.c\. Restore",
  ),
  "other containers": (
    lambda p: list(ADAMW.init(p)),
    r"got its arrays in other containers.*Restore a checkpoint into the state",
  ),
  "a state of the chain": (
    lambda p: optax.chain(FSAM, ADAMW).init(p),
    r"It is a state of `tx` as it is",
  ),
}


@pytest.mark.parametrize(("make", "message"), MISFITS.values(), ids=MISFITS)
def test_a_state_that_fits_neither_way_is_an_error(make, message):
  tx = optax.chain(FSAM, ADAMW)
  with pytest.raises(ValueError, match=message):
    checkpoint.into_chain(make(start()), tx, start())


def test_only_a_chain_has_a_first_link():
  state = ADAMW.init(start())
  with pytest.raises(ValueError, match=r"`tx` must be an `optax\.chain`.*got"):
    checkpoint.into_chain(
      state, optax.inject_hyperparams(fsam_optax.fsam)(0.1), start()
    )
  with pytest.raises(
    ValueError, match=r"`opt_state` must be that of .*got dict"
  ):
    checkpoint.out_of_chain(adam_state(state)._asdict(), ADAMW, start())


def test_the_state_of_another_chain_is_not_taken_apart():
  state = optax.chain(FSAM, optax.sgd(0.1, momentum=0.9)).init(start())
  with pytest.raises(ValueError, match=r"missing in `opt_state`: 0\.count"):
    checkpoint.out_of_chain(state, ADAMW, start())
  with pytest.raises(ValueError, match="a state of `tx` as it is"):
    checkpoint.out_of_chain(ADAMW.init(start()), ADAMW, start())

"""The optimizer's momentum in the place of an average of its own."""

import chex
from faces import FACES
from faces import state_of
from faces import step_of
from faces import train
from flax import nnx
from flax.training import train_state as flax_train_state
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
import numpy as np
import optax
import pytest

import fsam_optax

RHO, DECAY, RATE = 0.3, 0.8, 0.05


def perturbation(lmbda=DECAY, **kwargs):
  return fsam_optax.friendly_perturbation(
    RHO, lmbda=lmbda, average="optimizer", **kwargs
  )


# By NumPy: the average is written out over all gradients that came before.


def gradient_by_hand(weights, batch):
  """Of the mean squared error of a linear model."""
  inputs, targets = batch
  residual = inputs @ weights - targets
  return 2 * inputs.T @ residual / len(residual)


def weighted_mean(history):
  weights = DECAY ** np.arange(len(history))[::-1]
  return np.tensordot(weights, history, 1) / weights.sum()


def sgd_by_hand(weights, history):
  decays = DECAY ** np.arange(len(history))[::-1]
  return weights - RATE * np.tensordot(decays, history, 1)


def adam_by_hand(weights, history):
  decays = 0.999 ** np.arange(len(history))[::-1]
  squares = np.tensordot(decays, np.square(history), 1) / decays.sum()
  return weights - RATE * weighted_mean(history) / (np.sqrt(squares) + 1e-8)


OPTIMIZERS = {
  "sgd": (optax.sgd(RATE, momentum=DECAY), sgd_by_hand),
  "adam": (optax.adam(RATE, b1=DECAY), adam_by_hand),
}


def trained_by_hand(
  step, weights, batches, sigma=1.0, order="official", start=0, replicas=1
):
  """The weights after all batches; the first `start` of them do not ascend."""
  history = []
  for t, batch in enumerate(batches):
    average = weighted_mean(history) if history else np.zeros_like(weights)
    seconds = []
    for part in zip(*(np.split(x, replicas) for x in batch), strict=True):
      gradient = gradient_by_hand(weights, part)
      if order == "paper":
        average = DECAY * average + (1 - DECAY) * gradient
      direction = gradient - sigma * average
      epsilon = RHO * direction / np.linalg.norm(direction) * (t >= start)
      seconds.append(gradient_by_hand(weights + epsilon, part))
    history.append(np.mean(seconds, axis=0))
    weights = step(weights, history)
  return weights


def loss_fn(params, batch):
  inputs, targets = batch
  return jnp.mean((inputs @ params["w"] - targets) ** 2)


def train_state(tx, params, **kwargs):
  return state_of(params, perturbation(**kwargs), tx)


def least_squares(steps=5, rows=8):
  draw = np.random.default_rng(0).normal
  return draw(size=3), [
    (draw(size=(rows, 3)), draw(size=rows)) for _ in range(steps)
  ]


@pytest.mark.parametrize(
  ("face", "name", "sigma", "order"),
  [
    ("chain", "sgd", 1.0, "official"),
    ("value_and_grad", "adam", 0.6, "paper"),
    ("train_step", "sgd", 1.0, "official"),
    ("nnx_optimizer", "adam", 0.6, "paper"),
  ],
)
def test_every_face_is_the_one_by_hand(x64, face, name, sigma, order):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS[name]
  ascent = perturbation(sigma=sigma, order=order)
  stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *batches)
  (params, state, _), _ = train(
    FACES[face], loss_fn, {"w": weights}, stacked, tx, ascent
  )
  expected = trained_by_hand(by_hand, weights, batches, sigma, order)
  np.testing.assert_allclose(params["w"], expected, rtol=1e-6)
  # Nothing but scalars is kept.
  assert {np.shape(x) for x in jax.tree.leaves(state)} == {()}
  assert len(jax.tree.leaves(state)) == 4


# Whatever wraps the momentum, its average of equal gradients is that gradient.


PARAMS = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
PARAMS["norm"] = jnp.ones(4)
SGD, ADAM = optax.sgd(0.1, momentum=0.9), optax.adam(0.1)
DENSE = {"dense": True, "norm": False}
GROUPS = {"dense": "sgd", "norm": "other"}
WRAPPED = {
  "sgd": SGD,
  "bfloat16": optax.adam(0.1, mu_dtype=jnp.bfloat16),
  "lion": optax.lion(0.1, b2=0.9),
  "inject": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
  "partition": optax.partition({"sgd": SGD, "other": ADAM}, GROUPS),
  "accumulated": optax.MultiSteps(SGD, 3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_average_of_equal_gradients_is_the_gradient(name):
  tx, ascent = WRAPPED[name], perturbation(0.9)
  gradient = jax.tree.map(lambda x: jnp.full_like(x, 0.25), PARAMS)
  state = train_state(tx, PARAMS, lmbda=0.9).opt_state
  update = jax.jit(optax.with_extra_args_support(tx).update)
  for _ in range(12 if name == "accumulated" else 4):
    _, state = update(gradient, state, PARAMS)
  seen = []
  ascent.update(
    gradient,
    ascent.init(PARAMS),
    PARAMS,
    optimizer_state=state,
    optimizer_steps=jnp.asarray(4),
    averages=seen,
  )
  tolerance = 1e-2 if name == "bfloat16" else 1e-6
  chex.assert_trees_all_close(seen[0], gradient, rtol=tolerance)


def test_a_masked_optimizer_serves_a_masked_perturbation():
  tx = optax.masked(SGD, DENSE)
  ascent = perturbation(0.9, mask=DENSE)
  state = train_state(tx, PARAMS, lmbda=0.9, mask=DENSE)
  epsilon, _ = ascent.update(
    PARAMS, state.perturbation_state, PARAMS, optimizer_state=state.opt_state
  )
  assert optax.tree.norm(epsilon["norm"]) == 0
  with pytest.raises(ValueError, match=r"at \['norm'\], got none in MaskedSt"):
    train_state(tx, PARAMS, lmbda=0.9)


REFUSED = {
  "none": (optax.sgd(0.1), "got none in a state without arrays. Take"),
  "another decay": (
    optax.sgd(0.1, momentum=0.95),
    "got 0.9 for 0.95 of TraceState at .* Give `lmbda=0.95`",
  ),
  "no decay": (optax.sgd(0.1, momentum=0.0), "got 0.9 for 0 of TraceState"),
  "no decay of Adam": (optax.adam(0.1, b1=0.0), "got 0.9 for 0 of ScaleByAdam"),
  "accumulated": (
    optax.MultiSteps(optax.sgd(0.1, momentum=0.8), 2),
    "got 0.9 for 0.8 of TraceState",
  ),
  "rmsprop": (
    optax.rmsprop(0.1, momentum=0.9),
    "got one behind ScaleByRmsState",
  ),
  "scaled": (
    optax.chain(optax.scale(0.5), SGD),
    "got one in TraceState of 0.5 times the gradients at .* Put the link",
  ),
  "of rows": (optax.sm3(0.1), "got none in ScaleBySM3State"),
  "two": (
    optax.chain(optax.trace(0.9), optax.scale_by_adam()),
    "got those of TraceState and ScaleByAdamState",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_momentum_is_refused_when_the_state_is_made(name):
  tx, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    train_state(tx, PARAMS, lmbda=0.9)


squares = lambda params, _: optax.tree.norm(params, squared=True)
BY_SIZE = lambda params: jax.tree.map(lambda x: x.size > 100, params)


@pytest.mark.parametrize(
  ("tx", "mask"),
  [
    (SGD, BY_SIZE),
    (optax.masked(SGD, BY_SIZE), BY_SIZE),
    (optax.sgd(0.1, momentum=0.9, accumulator_dtype=jnp.float16), None),
    (optax.adam(0.1, mu_dtype=jnp.float16), None),
  ],
  ids=["size", "both by size", "float16 of SGD", "float16 of Adam"],
)
def test_a_mask_by_size_and_a_narrow_momentum_are_right(tx, mask):
  params = {"w": jnp.ones((8, 16)), "b": jnp.ones(3)}
  state = train_state(tx, params, lmbda=0.9, mask=mask)
  step = step_of(squares)
  for batch in range(3):
    state, metrics = step(state, batch)
  np.testing.assert_allclose(metrics["perturbation_norm"], RHO, rtol=1e-5)


def test_groups_with_radii_of_their_own_are_looked_at_each():
  groups = lambda lmbda: optax.partition(
    {
      "sgd": perturbation(0.9),
      "other": fsam_optax.friendly_perturbation(
        0.1, lmbda=lmbda, average="optimizer"
      ),
    },
    GROUPS,
  )
  create = lambda lmbda: state_of(PARAMS, groups(lmbda), SGD)
  with pytest.raises(ValueError, match=r"got 0.8 for 0.9 .* at \['norm'\]"):
    create(0.8)
  _, metrics = step_of(squares, jit=False)(create(0.9), None)
  np.testing.assert_allclose(
    metrics["perturbation_norm"], np.hypot(RHO, 0.1), rtol=1e-5
  )


def test_another_decay_is_refused_in_nnx_and_in_a_traced_program():
  model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"got 0.8 for 0.9 of TraceState"):
    fsam_optax.nnx.Optimizer(
      model, SGD, wrt=nnx.Param, perturbation=perturbation(0.8)
    )
  with pytest.raises(ValueError, match=r"got 0.8 for 0.9 of TraceState"):
    jax.eval_shape(lambda: train_state(SGD, jnp.ones(2)))


def test_the_cosine_is_that_with_the_average(x64):
  weights, batches = least_squares()
  state = train_state(OPTIMIZERS["sgd"][0], {"w": weights})
  step = step_of(loss_fn, metrics=("gradient_ema_cosine", "direction_norm"))
  cosines = []
  for batch in batches:
    gradient = gradient_by_hand(np.asarray(state.params["w"]), batch)
    trace = np.asarray(state.opt_state[0].trace["w"])
    state, metrics = step(state, batch)
    cosines.append(float(metrics["gradient_ema_cosine"]))
  expected = trace @ gradient / np.linalg.norm(trace) / np.linalg.norm(gradient)
  assert cosines[0] == 0
  np.testing.assert_allclose(cosines[-1], expected, rtol=1e-6)


def test_a_skipped_step_counts_no_update():
  weights, (batch, (inputs, targets)) = least_squares(steps=2)
  step = step_of(loss_fn)
  state, _ = step(train_state(SGD, {"w": weights}, lmbda=0.9), batch)
  before = jax.tree.map(jnp.copy, state)
  state, metrics = step(state, (inputs * np.nan, targets))
  assert metrics["skipped"] == 1
  chex.assert_trees_all_equal(state, before)


def test_an_injected_schedule_counts_the_steps_that_were_taken():
  perturbation = optax.inject_hyperparams(fsam_optax.sam_perturbation)(
    rho=lambda count: 0.1 * (count + 1)
  )
  state, norms = state_of({"w": jnp.ones(2)}, perturbation), []
  step = step_of(lambda params, factor: factor * jnp.sum(params["w"]))
  for factor in (1.0, np.nan, 1.0):
    state, metrics = step(state, jnp.float32(factor))
    norms.append(float(metrics["perturbation_norm"]))
  np.testing.assert_allclose(norms, [0.1, 0.0, 0.2], rtol=1e-6)


def test_gates_and_micro_batches_leave_the_average_to_the_optimizer(x64):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS["sgd"]
  step = step_of(loss_fn, num_microbatches=4, start=1)
  state = train_state(tx, {"w": weights})
  for batch in batches:
    state, _ = step(state, batch)
  expected = trained_by_hand(by_hand, weights, batches, start=1)
  np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
  ("is_global", "check_vma"), [(True, True), (False, True), (False, False)]
)
def test_local_ascents_need_one_all_reduce(is_global, check_vma):
  """The momentum is a mean over replicas already."""
  weights, batches = least_squares(steps=3)
  step = step_of(
    loss_fn, axis_name="data", sync_perturbation=is_global, jit=False
  )
  mapped = jax.jit(
    jax.shard_map(
      step,
      mesh=make_mesh(data=4),
      in_specs=(P(), P("data")),
      out_specs=(P(), P()),
      check_vma=check_vma,
    )
  )
  tx, by_hand = OPTIMIZERS["sgd"]
  state = train_state(tx, {"w": weights})
  compiled = mapped.lower(state, batches[0]).compile()
  lines = compiled.as_text().splitlines()
  reduced = [x for x in lines if "all-reduce(" in x and "[3]" in x]
  assert len(reduced) == (2 if is_global else 1)
  for batch in batches:
    state, _ = mapped(state, batch)
  replicas = 1 if is_global else 4
  expected = trained_by_hand(by_hand, weights, batches, replicas=replicas)
  np.testing.assert_allclose(state.params["w"], expected, rtol=2e-5)


def test_complex_weights_ascend_along_their_conjugate():
  """Which are trained as pairs of real ones."""
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.normal(size=(3, 2)) @ [1, 1j], jnp.complex64)
  weights, goals = draw(), [draw(), draw()]
  loss = lambda w, goal: jnp.sum(jnp.abs(w - goal) ** 2) + jnp.real(w[0] * w[1])
  pairs = lambda w, goal: loss(jax.lax.complex(w[0], w[1]), goal)
  conjugate = optax.stateless(lambda u, p: jnp.conj(u))
  tx = optax.chain(conjugate, optax.sgd(0.1, momentum=DECAY))
  batches = jnp.stack(goals * 2)
  (found, *_), (expected, *_) = (
    train(FACES["value_and_grad"], fn, start, batches, tx, perturbation())[0]
    for fn, start in [
      (loss, weights),
      (pairs, jnp.stack([weights.real, weights.imag])),
    ]
  )
  np.testing.assert_allclose(
    jnp.stack([found.real, found.imag]), expected, rtol=1e-5, atol=1e-6
  )


def test_flax_state_goes_on_with_the_momentum_it_has(x64):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS["sgd"]
  state = flax_train_state.TrainState.create(
    apply_fn=None, params={"w": jnp.asarray(weights)}, tx=tx
  )
  for batch in batches[:4]:
    gradient = gradient_by_hand(np.asarray(state.params["w"]), batch)
    state = state.apply_gradients(grads={"w": jnp.asarray(gradient)})
  expected = trained_by_hand(by_hand, weights, batches, start=4)
  # A chain, whose state has to say how many updates there were.
  both = optax.chain(fsam_optax.sharpness_aware(perturbation()), tx)
  ascent_state = optax.tree.set(both.init(state.params)[0], count=4)
  opt_state = ascent_state, state.opt_state
  grad_fn = lambda params: jax.grad(loss_fn)(params, batches[4])
  updates, _ = both.update(
    grad_fn(state.params),
    opt_state,
    state.params,
    grad_fn=grad_fn,
    optimizer_state=opt_state,
  )
  found = optax.apply_updates(state.params, updates)
  np.testing.assert_allclose(found["w"], expected, rtol=1e-6)
  state = train_state(tx, state.params).replace(
    step=jnp.int32(state.step), opt_state=state.opt_state
  )
  state, _ = step_of(loss_fn)(state, batches[4])
  np.testing.assert_allclose(state.params["w"], expected, rtol=1e-6)

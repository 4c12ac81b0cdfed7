"""The optimizer's momentum in the place of an average of its own."""

import tempfile

import chex
from flax import nnx
from flax.training import train_state as flax_train_state
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
from oracle import LeastSquares
import orbax.checkpoint as ocp
import pytest
from versions import as_pure

import fsam_optax
from fsam_optax import checkpoint

RHO, DECAY, RATE = 0.3, 0.8, 0.05


def perturbation(lmbda=DECAY, **kwargs):
  return fsam_optax.friendly_perturbation(
    RHO, lmbda=lmbda, average="optimizer", **kwargs
  )


# By NumPy: the average is written out over all gradients that came before.


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


def trained_by_hand(step, weights, batches, sigma, order):
  history = []
  for batch in batches:
    gradient = LeastSquares.gradient(weights, batch)
    average = weighted_mean(history) if history else np.zeros_like(weights)
    if order == "paper":
      average = DECAY * average + (1 - DECAY) * gradient
    direction = gradient - sigma * average
    epsilon = RHO * direction / np.linalg.norm(direction)
    history.append(LeastSquares.gradient(weights + epsilon, batch))
    weights = step(weights, history)
  return weights


def loss_fn(weights, batch):
  inputs, targets = batch
  return jnp.mean((inputs @ weights - targets) ** 2)


def step_loss(params, model_state, batch, rng):
  del rng
  return loss_fn(params, batch), (model_state, {})


def with_value_and_grad(tx, weights, batches, **kwargs):
  ascent = perturbation(**kwargs)
  fn = jax.jit(fsam_optax.value_and_grad(loss_fn, ascent))
  state, opt_state = ascent.init(weights), tx.init(weights)
  for batch in batches:
    _, grads, state, _ = fn(weights, state, batch, optimizer_state=opt_state)
    updates, opt_state = tx.update(grads, opt_state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights, state


def in_a_chain(tx, weights, batches, **kwargs):
  link = fsam_optax.fsam(RHO, lmbda=DECAY, average="optimizer", **kwargs)
  tx = optax.chain(link, tx)
  opt_state = tx.init(weights)
  for batch in batches:
    grad_fn = lambda params, batch=batch: jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(
      grad_fn(weights),
      opt_state,
      weights,
      grad_fn=grad_fn,
      optimizer_state=opt_state,
    )
    weights = optax.apply_updates(weights, updates)
  return weights, opt_state[0]


def with_train_step(tx, weights, batches, **kwargs):
  state = train_state(tx, weights, **kwargs)
  step = fsam_optax.make_train_step(step_loss)
  for batch in batches:
    state, _ = step(state, batch)
  return state.params, state.perturbation_state


class Linear(nnx.Module):
  def __init__(self, weights):
    self.weights = nnx.Param(weights)


def with_nnx(tx, weights, batches, **kwargs):
  model = Linear(weights)
  optimizer = fsam_optax.nnx.Optimizer(
    model, tx, wrt=nnx.Param, perturbation=perturbation(**kwargs)
  )
  loss_of = lambda model, batch: loss_fn(model.weights[...], batch)
  for batch in batches:
    _, grads = optimizer.value_and_grad(loss_of)(model, batch)
    optimizer.update(model, grads)
  return model.weights[...], as_pure(optimizer.perturbation_state)


FACES = [with_value_and_grad, in_a_chain, with_train_step, with_nnx]


def train_state(tx, params, **kwargs):
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params=jax.tree.map(jnp.array, params),
    tx=tx,
    perturbation=perturbation(**kwargs),
  )


def least_squares(steps=5, rows=8):
  rng = np.random.default_rng(0)
  draw = rng.normal
  return draw(size=3), [
    (draw(size=(rows, 3)), draw(size=rows)) for _ in range(steps)
  ]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize(
  ("sigma", "order"), [(1.0, "official"), (0.6, "paper")]
)
def test_every_face_is_the_one_by_hand(x64, face, name, sigma, order):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS[name]
  found, state = face(
    tx, jnp.asarray(weights), batches, sigma=sigma, order=order
  )
  expected = trained_by_hand(by_hand, weights, batches, sigma, order)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
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
  "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True),
  "bfloat16": optax.adam(0.1, mu_dtype=jnp.bfloat16),
  "adamw": optax.adamw(0.1),
  "lamb": optax.lamb(0.1),
  "adabelief": optax.adabelief(0.1),
  "amsgrad": optax.amsgrad(0.1),
  "lion": optax.lion(0.1, b2=0.9),
  "clip": optax.chain(optax.clip_by_global_norm(10.0), SGD),
  "inject": optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9),
  "partition": optax.partition({"sgd": SGD, "other": ADAM}, GROUPS),
  "finite": optax.apply_if_finite(SGD, 3),
  "accumulated": optax.MultiSteps(SGD, 3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_the_average_of_equal_gradients_is_the_gradient(name):
  tx, ascent = WRAPPED[name], perturbation(0.9)
  gradient = jax.tree.map(lambda x: jnp.full_like(x, 0.25), PARAMS)
  state = train_state(tx, PARAMS, lmbda=0.9).opt_state
  update = jax.jit(optax.with_extra_args_support(tx).update)
  number, steps = (12, 4) if name == "accumulated" else (4, 4)
  for _ in range(number):
    _, state = update(gradient, state, PARAMS)
  seen = []
  ascent.update(
    gradient,
    ascent.init(PARAMS),
    PARAMS,
    optimizer_state=state,
    optimizer_steps=jnp.asarray(steps),
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
  "adam": (optax.adam(0.1, b1=0.95), "got 0.9 for 0.95 of ScaleByAdamState"),
  "accumulated": (
    optax.MultiSteps(optax.sgd(0.1, momentum=0.8), 2),
    "got 0.9 for 0.8 of TraceState",
  ),
  "lars": (optax.lars(0.1), "in TraceState of -0.1 times the gradients"),
  "rmsprop": (
    optax.rmsprop(0.1, momentum=0.9),
    "got one behind ScaleByRmsState",
  ),
  "scaled": (
    optax.chain(optax.scale(0.5), SGD),
    "got one in TraceState of 0.5 times the gradients at .* Move what",
  ),
  "novograd": (optax.novograd(0.1), "got none in ScaleByNovogradState"),
  "adafactor": (optax.adafactor(0.1), "got none in FactoredState"),
  "of rows": (optax.sm3(0.1), "got none in ScaleBySM3State"),
  "linesearch": (optax.lbfgs(), "got none in ScaleByLBFGSState"),
  "two": (
    optax.chain(optax.trace(0.9), optax.scale_by_adam()),
    "got those of TraceState and ScaleByAdamState",
  ),
  "frozen": (
    optax.partition({"sgd": SGD, "other": optax.set_to_zero()}, GROUPS),
    r"at \['norm'\], got none in PartitionState",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_momentum_is_refused_when_the_state_is_made(name):
  tx, message = REFUSED[name]
  with pytest.raises(ValueError, match=message):
    train_state(tx, PARAMS, lmbda=0.9)


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
  create = lambda lmbda: fsam_optax.TrainState.create(
    apply_fn=None, params=PARAMS, tx=SGD, perturbation=groups(lmbda)
  )
  with pytest.raises(ValueError, match=r"got 0.8 for 0.9 .* at \['norm'\]"):
    create(0.8)
  step = fsam_optax.make_train_step(
    lambda params, *_: (optax.tree.norm(params, squared=True), (None, {})),
    jit=False,
  )
  _, metrics = step(create(0.9), None)
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


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    (
      {"lmbda": lambda count: 0.9},
      "`lmbda` must be the decay of the optimizer's momentum",
    ),
    ({"lmbda": 1.0}, "a number below 1, got 1.0"),
    ({"accumulator_dtype": "bfloat16"}, "`accumulator_dtype` must be None"),
    (
      {"average": "momentum"},
      "`average` must be 'own' or 'optimizer', got 'mo",
    ),
  ],
)
def test_what_does_not_go_together_is_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    fsam_optax.friendly_perturbation(**({"average": "optimizer"} | kwargs))


def test_the_state_has_to_be_handed_over():
  weights, [batch] = least_squares(steps=1)
  ascent = perturbation()
  fn = fsam_optax.value_and_grad(loss_fn, ascent)
  with pytest.raises(ValueError, match="`optimizer_state` must be given"):
    fn(weights, ascent.init(weights), batch)


# Options of the passes.


def test_the_cosine_is_that_with_the_average(x64):
  weights, batches = least_squares()
  state = train_state(OPTIMIZERS["sgd"][0], weights)
  step = fsam_optax.make_train_step(
    step_loss, metrics=("gradient_ema_cosine", "direction_norm")
  )
  cosines = []
  for batch in batches:
    gradient = LeastSquares.gradient(np.asarray(state.params), batch)
    trace = np.asarray(state.opt_state[0].trace)
    state, metrics = step(state, batch)
    cosines.append(float(metrics["gradient_ema_cosine"]))
  expected = trace @ gradient / np.linalg.norm(trace) / np.linalg.norm(gradient)
  assert cosines[0] == 0
  np.testing.assert_allclose(cosines[-1], expected, rtol=1e-6)


def test_a_skipped_step_counts_no_update():
  weights, batches = least_squares(steps=3)
  inputs, targets = batches[1]
  batches[1] = (inputs * np.nan, targets)
  step = fsam_optax.make_train_step(step_loss)
  state = train_state(SGD, weights, lmbda=0.9)
  state, _ = step(state, batches[0])
  before = jax.tree.map(jnp.copy, state)
  state, metrics = step(state, batches[1])
  assert metrics["skipped"] == 1
  chex.assert_trees_all_equal(state, before)


def test_gates_and_micro_batches_leave_the_average_to_the_optimizer(x64):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS["sgd"]
  step = fsam_optax.make_train_step(step_loss, num_microbatches=4, start=1)
  state = train_state(tx, weights)
  for batch in batches:
    state, _ = step(state, batch)
  history = []
  for t, batch in enumerate(batches):
    gradient = LeastSquares.gradient(weights, batch)
    if t >= 1:
      direction = gradient - weighted_mean(history)
      epsilon = RHO * direction / np.linalg.norm(direction)
      gradient = LeastSquares.gradient(weights + epsilon, batch)
    history.append(gradient)
    weights = by_hand(weights, history)
  np.testing.assert_allclose(state.params, weights, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("is_global", [True, False])
def test_local_ascents_need_one_all_reduce(is_global, check_vma):
  """The momentum is a mean over replicas already."""
  weights, batches = least_squares(steps=3, rows=8)
  mesh = jax.make_mesh(
    (4,),
    ("data",),
    devices=jax.devices()[:4],
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  step = fsam_optax.make_train_step(
    step_loss, axis_name="data", sync_perturbation=is_global, jit=False
  )
  mapped = jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(P(), P("data")),
      out_specs=(P(), P()),
      check_vma=check_vma,
    )
  )
  state = train_state(SGD, weights.astype(np.float32), lmbda=0.9)
  batches = [jax.tree.map(np.float32, batch) for batch in batches]
  text = mapped.lower(state, batches[0]).compile().as_text()
  reduced = [
    line
    for line in text.splitlines()
    if "all-reduce(" in line and "[3]" in line
  ]
  assert len(reduced) == (2 if is_global else 1)
  for batch in batches:
    state, _ = mapped(state, batch)
  # By hand: each replica's direction from its own rows.
  weights, history = weights.astype(np.float32), []
  decay = 0.9
  for batch in batches:
    parts = [tuple(x[i : i + 2] for x in batch) for i in range(0, 8, 2)]
    scale = decay ** np.arange(len(history))[::-1]
    average = np.tensordot(scale, history, 1) / scale.sum() if history else 0
    seconds = []
    for part in parts:
      rows = batch if is_global else part
      direction = LeastSquares.gradient(weights, rows) - average
      epsilon = RHO * direction / np.linalg.norm(direction)
      seconds.append(LeastSquares.gradient(weights + epsilon, part))
    history.append(np.mean(seconds, axis=0))
    decays = decay ** np.arange(len(history))[::-1]
    weights = weights - 0.1 * np.tensordot(decays, history, 1)
  np.testing.assert_allclose(state.params, weights, rtol=2e-5)


def test_complex_weights_ascend_along_their_conjugate():
  rng = np.random.default_rng(1)
  draw = lambda: jnp.asarray(rng.normal(size=(3, 2)) @ [1, 1j], jnp.complex64)
  weights, goals = draw(), [draw(), draw()]
  loss = lambda w, goal: jnp.sum(jnp.abs(w - goal) ** 2) + jnp.real(w[0] * w[1])
  pairs = lambda w, goal: loss(jax.lax.complex(w[0], w[1]), goal)
  tx = optax.sgd(0.1, momentum=DECAY)
  ascent = perturbation()
  ends = []
  for fn, start in [
    (loss, weights),
    (pairs, jnp.stack([weights.real, weights.imag])),
  ]:
    passes = fsam_optax.value_and_grad(fn, ascent)
    state, opt_state, params = ascent.init(start), tx.init(start), start
    for goal in goals * 2:
      _, grads, state, _ = passes(
        params, state, goal, optimizer_state=opt_state
      )
      updates, opt_state = tx.update(grads, opt_state, params)
      params = optax.apply_updates(params, jax.tree.map(jnp.conj, updates))
    ends.append(params)
  np.testing.assert_allclose(
    jnp.stack([ends[0].real, ends[0].imag]), ends[1], rtol=1e-5, atol=1e-6
  )


# A run that goes on.


def test_flax_state_goes_on_with_the_momentum_it_has(x64):
  weights, batches = least_squares()
  tx, by_hand = OPTIMIZERS["sgd"]
  state = flax_train_state.TrainState.create(
    apply_fn=None, params={"w": jnp.asarray(weights)}, tx=tx
  )
  history = []
  for batch in batches[:4]:
    history.append(LeastSquares.gradient(weights, batch))
    weights = by_hand(weights, history)
    state = state.apply_gradients(grads={"w": jnp.asarray(history[-1])})
  state = fsam_optax.TrainState.from_flax(state, perturbation=perturbation())
  step = fsam_optax.make_train_step(
    lambda params, *args: step_loss(params["w"], *args)
  )
  state, _ = step(state, batches[4])
  direction = LeastSquares.gradient(weights, batches[4]) - weighted_mean(
    history
  )
  epsilon = RHO * direction / np.linalg.norm(direction)
  history.append(LeastSquares.gradient(weights + epsilon, batches[4]))
  np.testing.assert_allclose(
    state.params["w"], by_hand(weights, history), rtol=1e-6
  )


def test_a_resumed_run_is_the_unbroken_one_and_leaves_an_old_average_out():
  weights, batches = least_squares()
  step = fsam_optax.make_train_step(step_loss)
  tx = OPTIMIZERS["sgd"][0]
  start = lambda average: fsam_optax.TrainState.create(
    apply_fn=None,
    params=jnp.asarray(weights, jnp.float32),
    tx=tx,
    perturbation=fsam_optax.friendly_perturbation(
      RHO, lmbda=DECAY, average=average
    ),
  )

  def restored(saved, into):
    with (
      tempfile.TemporaryDirectory() as directory,
      ocp.CheckpointManager(
        directory, item_handlers=ocp.PyTreeCheckpointHandler()
      ) as manager,
    ):
      manager.save(1, args=ocp.args.PyTreeSave(saved))
      manager.wait_until_finished()
      checkpoint.check(manager.item_metadata(1), into)
      restore_args = ocp.checkpoint_utils.construct_restore_args(into)
      return manager.restore(
        1,
        args=ocp.args.PyTreeRestore(
          into, restore_args=restore_args, partial_restore=True
        ),
      )

  def after(state, batches):
    for batch in batches:
      state, _ = step(state, batch)
    return state

  def assert_equal(state, other):
    chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(other))

  half = after(start("optimizer"), batches[:2])
  resumed = restored(half, start("optimizer"))
  assert_equal(after(half, batches[2:]), after(resumed, batches[2:]))
  # Before the first update both averages are none.
  old = after(start("own"), batches[:1])
  assert_equal(
    restored(old, start("optimizer")), after(start("optimizer"), batches[:1])
  )

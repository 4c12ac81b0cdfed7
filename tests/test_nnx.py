"""The Flax NNX face: one step moves what the plain loop's step moves."""

import inspect

from by_hand import assert_close
import chex
from flax import nnx
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax
import pytest
from versions import as_pure
from versions import set_mesh

import fsam_optax

STEPS = 3


class Network(nnx.Module):
  """BatchNorm and Dropout between two layers."""

  def __init__(self, rngs):
    self.hidden = nnx.Linear(3, 8, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.output = nnx.Linear(8, 2, rngs=rngs)

  def features(self, inputs):
    return self.dropout(jnp.tanh(self.norm(self.hidden(inputs))))

  def __call__(self, inputs):
    return self.output(self.features(inputs))


def loss_fn(model, batch):
  inputs, targets = batch
  return jnp.mean((model(inputs) - targets) ** 2)


# One of each, so that the tests share compiled steps.
SGD = optax.sgd(0.1, momentum=0.9)
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.1, lmbda=0.6)
CHAIN = optax.chain(fsam_optax.fsam(rho=0.1, lmbda=0.6), SGD)


def params_of(model):
  return as_pure(nnx.state(model, nnx.Param))


def others_of(model):
  """What no gradient moves: statistics and counts."""
  moves = nnx.Not(nnx.Any(nnx.Param, nnx.RngKey))
  return as_pure(nnx.state(model, moves))


@nnx.jit
def plain_step(model, optimizer, batch):
  loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads)
  return loss


def step_of(face, loss_fn=loss_fn):
  """A compiled step of one of the two faces."""

  @nnx.jit
  def step(model, optimizer, batch):
    if face == "optimizer":
      loss, grads = optimizer.value_and_grad(loss_fn)(model, batch)
      optimizer.update(model, grads)
    else:
      fn = fsam_optax.nnx.value_and_grad(loss_fn)
      loss, grads, grad_fn = fn(model, batch)
      optimizer.update(model, grads, grad_fn=grad_fn)
    return loss

  return step


def plain(model):
  return nnx.Optimizer(model, SGD, wrt=nnx.Param)


def sharpness_aware(model, perturbation=PERTURBATION, wrt=nnx.Param):
  return fsam_optax.nnx.Optimizer(
    model, SGD, perturbation=perturbation, wrt=wrt
  )


sharpness_aware_step = step_of("optimizer")
FACES = {
  "optimizer": (sharpness_aware_step, sharpness_aware),
  "chain": (
    step_of("chain"),
    lambda model: nnx.Optimizer(model, CHAIN, wrt=nnx.Param),
  ),
}
both_faces = pytest.mark.parametrize("face", FACES)


def train(problem, step, make_optimizer):
  model = Network(nnx.Rngs(0))
  optimizer = make_optimizer(model)
  for t in range(STEPS):
    step(model, optimizer, problem.batch(t))
  return model


@both_faces
def test_statistics_and_rngs_move_as_in_the_plain_loop(problem, face):
  step, make_optimizer = FACES[face]
  model = Network(nnx.Rngs(0))
  optimizer = make_optimizer(model)
  for t in range(STEPS):
    # The plain loop's step from the same weights.
    shadow = nnx.clone(model)
    before = others_of(model)
    plain_step(shadow, plain(shadow), problem.batch(t))
    step(model, optimizer, problem.batch(t))
    chex.assert_trees_all_equal(others_of(model), others_of(shadow))
    assert not np.array_equal(
      others_of(model)["norm"]["mean"], before["norm"]["mean"]
    )
  assert model.dropout.rngs.count[...] == STEPS
  assert optimizer.step[...] == STEPS


@both_faces
def test_both_passes_see_the_same_dropout_mask(problem, face):
  """And the loss is traced in the first step alone."""
  passes, traces = [], []

  def loss_with_mask(model, batch):
    traces.append(None)
    mean = model.norm.mean[...]
    features = model.features(batch[0])
    jax.debug.callback(lambda x, m: passes.append((x != 0, m)), features, mean)
    return jnp.mean((model.output(features) - batch[1]) ** 2)

  train(problem, step_of(face, loss_with_mask), FACES[face][1])
  jax.effects_barrier()
  masks, means = zip(*passes, strict=True)
  assert len(masks) == 2 * STEPS
  assert len(traces) == (1 if face == "optimizer" else 2)
  for first, second in zip(masks[::2], masks[1::2], strict=True):
    assert 0 < np.mean(first) < 1
    np.testing.assert_array_equal(first, second)
  assert not np.array_equal(masks[0], masks[2])
  # And both start from the same statistics.
  np.testing.assert_array_equal(means[::2], means[1::2])
  assert not np.array_equal(means[0], means[2])


def test_no_perturbation_is_the_plain_loop_bit_for_bit(problem):
  alone = lambda model: sharpness_aware(model, perturbation=None)
  expected = train(problem, plain_step, plain)
  model = train(problem, sharpness_aware_step, alone)
  chex.assert_trees_all_equal(params_of(model), params_of(expected))
  chex.assert_trees_all_equal(others_of(model), others_of(expected))


def test_aux_info_rngs_and_metrics_are_those_of_the_first_pass(problem):
  """And each moves once a step."""
  model, dropout = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)
  rngs, metric = nnx.Rngs(dropout=1), nnx.metrics.Average()

  def loss_of(model, batch, rngs, *, metric, scale):
    outputs = dropout(model(batch[0]), rngs=rngs)
    loss = scale * jnp.mean((outputs - batch[1]) ** 2)
    metric.update(values=jax.lax.stop_gradient(loss))
    return loss, model.bias[...] + 0

  @nnx.jit
  def step(model, optimizer, batch, rngs, metric):
    fn = optimizer.value_and_grad(loss_of, has_aux=True, return_info=True)
    value, _, info = fn(model, batch, rngs, metric=metric, scale=2.0)
    return value, info

  optimizer, losses = sharpness_aware(model), []
  for t in range(2):
    (loss, bias), info = step(model, optimizer, problem.batch(t), rngs, metric)
    np.testing.assert_array_equal(bias, model.bias[...])
    np.testing.assert_allclose(info.perturbation_norm, 0.1, rtol=1e-5)
    assert abs(info.perturbed_value - loss) > 1e-3
    losses.append(loss)
  assert rngs.dropout.count[...] == 2
  np.testing.assert_allclose(metric.compute(), np.mean(losses), rtol=1e-6)


def test_only_what_the_filter_selects_is_perturbed_and_trained(problem):
  model = Network(nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, params_of(model))
  optimizer = sharpness_aware(model, wrt=nnx.PathContains("kernel"))
  sharpness_aware_step(model, optimizer, problem.batch(0))
  # An average, and so a gradient and a perturbation, of the two kernels alone.
  assert len(jax.tree.leaves(optimizer.perturbation_state[0].ema)) == 2
  after = params_of(model)
  chex.assert_trees_all_equal(after["norm"], before["norm"])
  assert not np.array_equal(
    after["output"]["kernel"], before["output"]["kernel"]
  )


def test_tied_weights_are_one_parameter(problem):
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.encoder = nnx.Linear(3, 3, rngs=rngs)
      self.decoder = self.encoder

    def __call__(self, inputs):
      return self.decoder(jnp.tanh(self.encoder(inputs)))[:, :2]

  model = Tied(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  first, second = (
    sharpness_aware_step(model, optimizer, problem.batch(0)) for _ in range(2)
  )
  assert second < first
  assert model.decoder is model.encoder
  assert len(jax.tree.leaves(optimizer.perturbation_state[0].ema)) == 2


def test_a_part_of_the_model_may_be_an_argument_as_well():
  class Two(nnx.Module):
    def __init__(self, rngs):
      self.inner = nnx.Linear(4, 3, rngs=rngs)
      self.outer = nnx.Linear(3, 1, rngs=rngs)

  model, x = Two(nnx.Rngs(0)), jnp.ones((2, 4))
  loss = lambda model, inner, x: jnp.mean((model.outer(inner(x)) - 1) ** 2)
  alone = lambda model, x: loss(model, model.inner, x)
  _, found, _ = fsam_optax.nnx.value_and_grad(loss)(model, model.inner, x)
  _, expected = nnx.value_and_grad(alone)(model, x)
  chex.assert_trees_all_equal(found, expected)


def test_gradients_of_one_pass_are_refused(problem):
  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  with pytest.raises(ValueError, match=r"`grads` must come from `optimizer"):
    plain_step(model, optimizer, problem.batch(0))
  sharpness_aware_step(model, optimizer, problem.batch(0))
  # One pass serves one update.
  with pytest.raises(ValueError, match=r"`grads` must come from `optimizer"):
    plain_step(model, optimizer, problem.batch(0))


def test_both_halves_can_be_compiled_apart(problem):
  passes = nnx.jit(lambda m, o, batch: o.value_and_grad(loss_fn)(m, batch)[1])
  update = nnx.jit(lambda m, o, grads: o.update(m, grads))
  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  for t in range(STEPS):
    update(model, optimizer, passes(model, optimizer, problem.batch(t)))
  expected = train(problem, sharpness_aware_step, sharpness_aware)
  chex.assert_trees_all_close(
    params_of(model), params_of(expected), rtol=1e-5, atol=1e-7
  )


def test_statistics_and_dropout_pass_from_part_to_part(problem):
  """As a loop over the parts moves them: the pass at the clean weights."""
  batch = problem.batch(0)
  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  nnx.jit(
    lambda m, o, b: o.value_and_grad(loss_fn, num_microbatches=2)(m, b)[0]
  )(model, optimizer, batch)
  expected = Network(nnx.Rngs(0))
  for i in range(2):
    part = jax.tree.map(lambda x, i=i: x[i::2], batch)
    nnx.jit(loss_fn)(expected, part)
  chex.assert_trees_all_close(
    others_of(model), others_of(expected), rtol=1e-5, atol=1e-7
  )


def test_gates_count_the_passes_of_a_loop_with_an_update_of_its_own(problem):
  """One that never calls `optimizer.update`, so that `step` stays at 0."""
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  traces, lengths = [], []

  @nnx.jit
  def passes(model, optimizer, batch):
    traces.append(1)
    options = {"return_info": True, "every": 2}
    return optimizer.value_and_grad(loss_fn, **options)(model, batch)

  for t in range(4):
    _, grads, info = passes(model, optimizer, problem.batch(t))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params_of(model), grads)
    nnx.update(model, as_pure(moved))
    lengths.append(float(info.perturbation_norm))
  np.testing.assert_allclose(lengths, [0.1, 0.0, 0.1, 0.0], rtol=1e-5)
  assert len(traces) == 1


def test_an_update_may_stand_in_a_branch(problem):
  @nnx.jit
  def step(model, optimizer, batch, is_taken):
    _, grads = optimizer.value_and_grad(loss_fn)(model, batch)

    def update(model, optimizer, grads):
      optimizer.update(model, grads)

    pass_over = lambda model, optimizer, grads: None
    nnx.cond(is_taken, update, pass_over, model, optimizer, grads)

  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  for t in range(STEPS):
    step(model, optimizer, problem.batch(t), True)
  expected = train(problem, sharpness_aware_step, sharpness_aware)
  chex.assert_trees_all_close(
    params_of(model), params_of(expected), rtol=1e-5, atol=1e-7
  )
  before = params_of(model)
  step(model, optimizer, problem.batch(0), False)
  chex.assert_trees_all_equal(params_of(model), before)


def test_the_loss_may_take_the_optimizer_and_update_returns_its_updates():
  """As a trainer that holds both, whose average must go on."""

  def loss_of(model, x, optimizer):
    steps = optimizer.step[...].astype(jnp.float32)
    return jnp.mean(model(x) ** 2) / (1 + steps)

  model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
  optimizer = sharpness_aware(model)
  with jax.numpy_dtype_promotion("strict"):
    for _ in range(2):
      _, grads = optimizer.value_and_grad(loss_of)(model, x, optimizer)
      updates = optimizer.update(model, grads)
  assert optimizer.perturbation_state[0].count[...] == 2
  plain = nnx.Optimizer(model, SGD, wrt=nnx.Param)
  assert (updates is None) == (plain.update(model, grads) is None)


def test_a_pass_without_an_update_is_no_step_of_the_optimizers_average():
  model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((4, 3))
  optimizer = sharpness_aware(
    model,
    fsam_optax.friendly_perturbation(0.1, lmbda=0.9, average="optimizer"),
  )
  square = lambda model, x: jnp.mean(model(x) ** 2)
  passes = optimizer.value_and_grad(square, return_info=True)
  passes(model, x)
  optimizer.update(model, passes(model, x)[1])
  # Of one gradient the momentum is the average.
  average = as_pure(optimizer.opt_state[0].trace)
  gradient = as_pure(nnx.grad(square)(model, 2 * x))
  expected = optax.tree.norm(jax.tree.map(jnp.subtract, gradient, average))
  info = passes(model, 2 * x)[-1]
  np.testing.assert_allclose(info.direction_norm, expected, rtol=1e-5)


def test_the_model_in_the_aux_is_refused_and_a_new_module_is_not():
  model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  loss_of = lambda model, x: (jnp.mean(model(x) ** 2), nnx.Dict(x=x))
  fn = optimizer.value_and_grad(loss_of, has_aux=True)
  if hasattr(nnx, "Pytree"):  # A module of Flax 0.11 crosses no gradient.
    assert fn(model, jnp.ones((4, 3)))[0][1].x.shape == (4, 3)
  loss_of = lambda model, x: (jnp.mean(model(x) ** 2), {"model": model})
  fn = optimizer.value_and_grad(loss_of, has_aux=True)
  with pytest.raises(ValueError, match="must return nothing of the model bes"):
    fn(model, jnp.ones((4, 3)))


class ShardedNetwork(nnx.Module):
  def __init__(self, hidden_sharding, rngs):
    init = nnx.initializers.lecun_normal()
    by = lambda *names: nnx.with_partitioning(init, names)
    self.up = nnx.Linear(3, 8, kernel_init=by(None, "model"), rngs=rngs)
    self.down = nnx.Linear(8, 2, kernel_init=by("model", None), rngs=rngs)
    self.out_sharding = hidden_sharding

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)), out_sharding=self.out_sharding)


def test_a_perturbation_whose_state_is_one_array():
  """Of one's own: it ascends by a tenth of the gradient, and counts."""
  own = optax.GradientTransformation(
    lambda params: jnp.zeros([], jnp.int32),
    lambda g, count, params: (optax.tree.scale(0.1, g), count + 1),
  )
  model = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
  optimizer = fsam_optax.nnx.Optimizer(
    model, optax.sgd(0.1), wrt=nnx.Param, perturbation=own
  )
  loss_fn = lambda model: jnp.sum(model.kernel[...] ** 2)
  kernel = model.kernel[...]
  _, grads = optimizer.value_and_grad(loss_fn)(model)
  np.testing.assert_allclose(grads["kernel"][...], 2.4 * kernel, rtol=1e-6)
  assert optimizer.perturbation_state[...] == 1


@pytest.mark.skipif(
  "out_sharding" not in inspect.signature(nnx.Linear.__call__).parameters,
  reason="Flax's layers take no sharding of what they return",
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_parameters_and_batch_over_a_mesh_train_as_on_one_device(problem, kind):
  """In the form of Flax's guide to many devices: annotated parameters."""

  def trained(**sizes):
    mesh = make_mesh(kind, **sizes)
    with set_mesh(mesh):
      model = ShardedNetwork(
        jax.P("data") if kind == "Explicit" else None, nnx.Rngs(0)
      )
      optimizer = sharpness_aware(model)
      rows = jax.NamedSharding(mesh, jax.P("data"))
      for t in range(STEPS):
        batch = jax.device_put(problem.batch(t), rows)
        sharpness_aware_step(model, optimizer, batch)
    return model, optimizer

  model, optimizer = trained(data=2, model=4)
  expected, _ = trained(data=1, model=1)
  assert_close(params_of(model), params_of(expected))
  average = optimizer.perturbation_state[0].ema
  for tree in (nnx.state(model, nnx.Param), average):
    assert tree["up"]["kernel"][...].sharding.spec == jax.P(None, "model")
    assert len(tree["up"]["kernel"][...].sharding.device_set) == 8

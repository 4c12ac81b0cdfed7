"""The Flax NNX face: one step moves what the plain loop's step moves."""

import functools
import inspect

from by_hand import assert_close
import chex
import faces
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
@functools.cache
def sgd():
  return optax.sgd(0.1, momentum=0.9)


def params_of(model):
  return as_pure(nnx.state(model, nnx.Param))


def others_of(model):
  """Everything that no gradient moves: statistics, keys, counts."""
  others = as_pure(nnx.state(model, nnx.Not(nnx.Param)))
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  return jax.tree.map(
    lambda x: jax.random.key_data(x) if is_key(x) else x, others
  )


@nnx.jit
def plain_step(model, optimizer, batch):
  loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads)
  return loss


@nnx.jit
def sharpness_aware_step(model, optimizer, batch):
  loss, grads = optimizer.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads)
  return loss


@nnx.jit
def chained_step(model, optimizer, batch):
  loss, grads, grad_fn = fsam_optax.nnx.value_and_grad(loss_fn)(model, batch)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


def plain(model):
  return nnx.Optimizer(model, sgd(), wrt=nnx.Param)


@functools.cache
def perturbation_of(rho):
  return fsam_optax.friendly_perturbation(rho=rho, lmbda=0.6)


@functools.cache
def chain_of(rho):
  return optax.chain(fsam_optax.fsam(rho=rho, lmbda=0.6), sgd())


def sharpness_aware(model, rho=0.05):
  return fsam_optax.nnx.Optimizer(
    model, sgd(), perturbation=perturbation_of(rho), wrt=nnx.Param
  )


def chained(model, rho=0.05):
  return nnx.Optimizer(model, chain_of(rho), wrt=nnx.Param)


FACES = {
  "optimizer": (sharpness_aware_step, sharpness_aware),
  "chain": (chained_step, chained),
}
both_faces = pytest.mark.parametrize("face", FACES)


def train(problem, step, make_optimizer, model=None, **kwargs):
  model = model or Network(nnx.Rngs(0))
  optimizer = make_optimizer(model, **kwargs)
  losses = [step(model, optimizer, problem.batch(t)) for t in range(STEPS)]
  return model, optimizer, losses


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

  @nnx.jit
  def step(model, optimizer, batch):
    if face == "optimizer":
      _, grads = optimizer.value_and_grad(loss_with_mask)(model, batch)
      optimizer.update(model, grads)
    else:
      fn = fsam_optax.nnx.value_and_grad(loss_with_mask)
      _, grads, grad_fn = fn(model, batch)
      optimizer.update(model, grads, grad_fn=grad_fn)

  train(problem, step, FACES[face][1])
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
  def base_alone(model):
    return fsam_optax.nnx.Optimizer(
      model, sgd(), perturbation=None, wrt=nnx.Param
    )

  expected, _, _ = train(problem, plain_step, plain)
  model, _, _ = train(problem, sharpness_aware_step, base_alone)
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

  optimizer, losses = sharpness_aware(model, rho=0.1), []
  for t in range(2):
    (loss, bias), info = step(model, optimizer, problem.batch(t), rngs, metric)
    np.testing.assert_array_equal(bias, model.bias[...])
    np.testing.assert_allclose(info.perturbation_norm, 0.1, rtol=1e-5)
    assert abs(info.perturbed_value - loss) > 1e-3
    losses.append(loss)
  assert rngs.dropout.count[...] == 2
  np.testing.assert_allclose(metric.compute(), np.mean(losses), rtol=1e-6)


def test_only_what_the_filter_selects_is_perturbed_and_trained(problem):
  kernels = nnx.PathContains("kernel")
  model = Network(nnx.Rngs(0))
  before = jax.tree.map(jnp.copy, params_of(model))
  optimizer = fsam_optax.nnx.Optimizer(
    model,
    sgd(),
    perturbation=fsam_optax.friendly_perturbation(),
    wrt=kernels,
  )
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


# Half-adopted loops, and the options.


def test_gradients_of_one_pass_are_refused(problem):
  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)

  @nnx.jit
  def half_adopted(model, optimizer, batch):
    _, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads)

  with pytest.raises(ValueError, match=r"`grads` must come from `optimizer"):
    half_adopted(model, optimizer, problem.batch(0))
  sharpness_aware_step(model, optimizer, problem.batch(0))
  # One pass serves one update.
  with pytest.raises(ValueError, match=r"`grads` must come from `optimizer"):
    half_adopted(model, optimizer, problem.batch(0))


def test_both_halves_can_be_compiled_apart(problem):
  passes = nnx.jit(lambda m, o, batch: o.value_and_grad(loss_fn)(m, batch)[1])
  update = nnx.jit(lambda m, o, grads: o.update(m, grads))
  model = Network(nnx.Rngs(0))
  optimizer = sharpness_aware(model)
  for t in range(STEPS):
    update(model, optimizer, passes(model, optimizer, problem.batch(t)))
  expected, _, _ = train(problem, sharpness_aware_step, sharpness_aware)
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
  passes = nnx.jit(
    lambda model, optimizer, batch: optimizer.value_and_grad(
      loss_fn, return_info=True, every=2
    )(model, batch)
  )
  lengths = []
  for t in range(4):
    _, grads, info = passes(model, optimizer, problem.batch(t))
    moved = jax.tree.map(lambda p, g: p - 0.1 * g, params_of(model), grads)
    nnx.update(model, as_pure(moved))
    lengths.append(float(info.perturbation_norm))
  np.testing.assert_allclose(lengths, [0.05, 0.0, 0.05, 0.0], rtol=1e-5)


# Over a mesh.


class ShardedNetwork(nnx.Module):
  def __init__(self, hidden_sharding, rngs):
    init = nnx.initializers.lecun_normal()
    by = lambda *names: nnx.with_partitioning(init, names)
    self.up = nnx.Linear(3, 8, kernel_init=by(None, "model"), rngs=rngs)
    self.down = nnx.Linear(8, 2, kernel_init=by("model", None), rngs=rngs)
    self.out_sharding = hidden_sharding

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)), out_sharding=self.out_sharding)


def two_layers_loss(params, batch):
  up, down = params["up"], params["down"]
  hidden = jnp.tanh(batch[0] @ up["kernel"] + up["bias"])
  return jnp.mean((hidden @ down["kernel"] + down["bias"] - batch[1]) ** 2)


@pytest.mark.skipif(
  "out_sharding" not in inspect.signature(nnx.Linear.__call__).parameters,
  reason="Flax's layers take no sharding of what they return",
)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_parameters_and_batch_over_a_mesh_train_as_on_one_device(problem, kind):
  """In the form of Flax's guide to many devices: annotated parameters."""
  mesh = make_mesh(kind, data=2, model=4)
  with set_mesh(mesh):
    model = ShardedNetwork(
      jax.P("data") if kind == "Explicit" else None, nnx.Rngs(0)
    )
    own = jax.tree.map(np.asarray, params_of(model))
    optimizer = sharpness_aware(model, rho=0.2)
    rows = jax.NamedSharding(mesh, jax.P("data"))
    for t in range(STEPS):
      batch = jax.device_put(problem.batch(t), rows)
      sharpness_aware_step(model, optimizer, batch)
  (expected, *_), _ = faces.train(
    faces.chain,
    two_layers_loss,
    jax.tree.map(jnp.asarray, own),
    jax.tree.map(lambda x: x[:STEPS], problem.batches),
    sgd(),
    perturbation_of(0.2),
  )
  assert_close(params_of(model), expected)
  average = optimizer.perturbation_state[0].ema
  for tree in (nnx.state(model, nnx.Param), average):
    assert tree["up"]["kernel"][...].sharding.spec == jax.P(None, "model")
    assert len(tree["up"]["kernel"][...].sharding.device_set) == 8

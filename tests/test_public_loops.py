"""Training programs as people publish them, with F-SAM put in: Flax.

Each is written down in the form that its kind has in public, adopts F-SAM in
the lines that its docstring counts, and must do what the equations do.
"""

from typing import Any

from by_hand import LMBDA
from by_hand import RHO
from by_hand import TOLERANCE
from by_hand import ByHand
from by_hand import assert_close
from by_hand import flat
from by_hand import unflat
from flax import linen as nn
from flax import nnx
from flax.linen import fp8_ops
import jax
from jax import numpy as jnp
import numpy as np
import optax
from oracle import FriendlySam
import pytest
from versions import as_pure
from versions import set_mesh

import fsam_optax

pytestmark = pytest.mark.slow

P = jax.sharding.PartitionSpec
STEPS, REPLICAS, MOMENTUM = 3, 4, 0.9


def perturbation(**kwargs):
  return fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA, **kwargs)


def cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


@pytest.fixture(scope="module")
def images():
  """Batches of 16 rows with their labels, of three kinds."""
  rng = np.random.default_rng(0)
  return [
    {
      "image": jnp.asarray(rng.normal(size=(16, 4)), jnp.float32),
      "label": jnp.asarray(rng.integers(3, size=16)),
    }
    for _ in range(STEPS)
  ]


# A data-parallel image classifier in Linen.


class NormNetwork(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    # No bias in front of the norm: its gradient is rounding alone.
    x = nn.Dense(8, use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
    return nn.Dense(3)(nn.tanh(x))


class NormTrainState(fsam_optax.TrainState):
  batch_stats: Any


NORM_NETWORK = NormNetwork()


def norm_loss(params, batch_stats, batch):
  logits, updated = NORM_NETWORK.apply(
    {"params": params, "batch_stats": batch_stats},
    batch["image"],
    mutable=["batch_stats"],
  )
  kernels = [x for x in jax.tree.leaves(params) if x.ndim > 1]
  decay = 0.005 * sum(jnp.sum(x**2) for x in kernels)
  loss = cross_entropy(logits, batch["label"]).mean() + decay
  return loss, (updated, logits)


norm_value = jax.jit(jax.value_and_grad(norm_loss, has_aux=True))


def pmapped_train_step(state, batch):
  def loss_fn(params):
    return norm_loss(params, state.batch_stats, batch)

  grad_fn = fsam_optax.value_and_grad(
    loss_fn, state.perturbation, has_aux=True, axis_name="batch"
  )
  (loss, (updated, logits)), grads, perturbation_state, _ = grad_fn(
    state.params, state.perturbation_state
  )
  grads = jax.lax.pmean(grads, axis_name="batch")
  accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
  metrics = jax.lax.pmean({"loss": loss, "accuracy": accuracy}, "batch")
  state = state.apply_gradients(
    grads=grads,
    perturbation_state=perturbation_state,
    batch_stats=updated["batch_stats"],
  )
  return state, metrics


def replicated(tree):
  return jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), tree)


def split_rows(batch):
  return jax.tree.map(lambda x: x.reshape(REPLICAS, -1, *x.shape[1:]), batch)


def replica(tree, i):
  return jax.tree.map(lambda x: x[i], tree)


class ReplicasByHand(ByHand):
  """The mean gradient of all replicas, each with its own statistics."""

  def __init__(self, variables, tx):
    super().__init__(variables["params"], tx)
    self.unused = variables["batch_stats"]
    self.mean = np.zeros((REPLICAS, 8))
    self.variance = np.ones((REPLICAS, 8))
    self.losses = []

  def step_on(self, batch):
    parts = [replica(split_rows(batch), i) for i in range(REPLICAS)]
    values = [norm_value(self.params, self.unused, part) for part in parts]
    self.losses.append(np.mean([loss for (loss, _), _ in values]))
    kernel = np.asarray(self.params["Dense_0"]["kernel"], np.float64)
    hidden = np.asarray(split_rows(batch)["image"], np.float64) @ kernel
    average = lambda old, new: MOMENTUM * old + (1 - MOMENTUM) * new
    self.mean = average(self.mean, hidden.mean(axis=1))
    self.variance = average(self.variance, hidden.var(axis=1))

    def gradient_of(params):
      values = [norm_value(params, self.unused, part) for part in parts]
      gradients = [gradient for _, gradient in values]
      return jax.tree.map(lambda *g: sum(g) / REPLICAS, *gradients)

    self.step(gradient_of)


def test_linen_with_batch_statistics_under_pmap(images):
  """The ImageNet example's kind: a state with statistics; 5 lines change."""
  variables = NORM_NETWORK.init(jax.random.key(0), images[0]["image"])
  tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
  state = NormTrainState.create(
    apply_fn=NORM_NETWORK.apply,
    params=variables["params"],
    tx=tx,
    batch_stats=variables["batch_stats"],
    perturbation=perturbation(),
  )
  by_hand = ReplicasByHand(variables, tx)
  state = replicated(state)
  step = jax.pmap(
    pmapped_train_step, axis_name="batch", devices=jax.devices()[:REPLICAS]
  )
  for batch in images:
    by_hand.step_on(batch)
    state, metrics = step(state, split_rows(batch))
    np.testing.assert_allclose(
      metrics["loss"], [by_hand.losses[-1]] * REPLICAS, rtol=1e-5
    )
  for i in range(REPLICAS):
    by_hand.assert_followed_by(replica(state.params, i))
  statistics = state.batch_stats["BatchNorm_0"]
  np.testing.assert_allclose(statistics["mean"], by_hand.mean, atol=TOLERANCE)
  np.testing.assert_allclose(
    statistics["var"], by_hand.variance, atol=TOLERANCE
  )
  assert np.ptp(statistics["mean"], axis=0).min() > 1e-3
  assert list(state.step) == [STEPS] * REPLICAS


def test_the_built_step_under_pmap(images):
  """The same loop on the step that the library builds; the step is 1 line."""
  variables = NORM_NETWORK.init(jax.random.key(0), images[0]["image"])
  tx = optax.sgd(0.1, momentum=0.9, nesterov=True)
  state = fsam_optax.TrainState.create(
    apply_fn=NORM_NETWORK.apply,
    params=variables["params"],
    tx=tx,
    model_state={"batch_stats": variables["batch_stats"]},
    perturbation=perturbation(),
  )

  def loss_fn(params, model_state, batch, rng):
    del rng
    loss, (model_state, _) = norm_loss(params, batch=batch, **model_state)
    return loss, (model_state, {})

  by_hand = ReplicasByHand(variables, tx)
  state = replicated(state)
  step = jax.pmap(
    fsam_optax.make_train_step(loss_fn, axis_name="batch", jit=False),
    axis_name="batch",
    devices=jax.devices()[:REPLICAS],
  )
  for batch in images:
    by_hand.step_on(batch)
    state, metrics = step(state, split_rows(batch))
    np.testing.assert_allclose(metrics["loss"][0], by_hand.losses[-1], 1e-5)
  by_hand.assert_followed_by(replica(state.params, 0))
  statistics = replica(state.model_state["batch_stats"]["BatchNorm_0"], 0)
  assert_close(statistics["mean"], by_hand.mean.mean(axis=0))
  assert_close(statistics["var"], by_hand.variance.mean(axis=0))


# The tutorial loop of NNX.


class NnxNetwork(nnx.Module):
  def __init__(self, *, rngs):
    self.hidden = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=MOMENTUM, rngs=rngs)
    self.dropout = nnx.Dropout(0.3)
    self.output = nnx.Linear(8, 3, rngs=rngs)

  def __call__(self, x, rngs=None):
    x = self.dropout(self.norm(self.hidden(x)), rngs=rngs)
    return self.output(jnp.tanh(x))


def nnx_loss(model, rngs, batch):
  logits = model(batch["image"], rngs)
  return cross_entropy(logits, batch["label"]).mean(), logits


@nnx.jit
def nnx_train_step(model, optimizer, metrics, rngs, batch):
  grad_fn = optimizer.value_and_grad(nnx_loss, has_aux=True)
  (loss, logits), grads = grad_fn(model, rngs, batch)
  metrics.update(loss=loss, logits=logits, labels=batch["label"])
  optimizer.update(model, grads)


def test_nnx_with_batch_norm_and_dropout(images):
  """The NNX tutorial's kind: metrics, and rngs as an argument; 2 lines."""
  tx = optax.sgd(0.1, momentum=0.9)
  model, rngs = NnxNetwork(rngs=nnx.Rngs(0)), nnx.Rngs(1)
  own_model, own_rngs = NnxNetwork(rngs=nnx.Rngs(0)), nnx.Rngs(1)
  optimizer = fsam_optax.nnx.Optimizer(
    model, tx, wrt=nnx.Param, perturbation=perturbation()
  )
  metrics = nnx.MultiMetric(
    accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
  )

  @jax.jit
  @jax.grad
  def gradient(params, rest, batch):
    network, keys = nnx.merge(graphdef, nnx.State({0: params}), rest)
    return nnx_loss(network, keys, batch)[0]

  params = as_pure(nnx.state(own_model, nnx.Param))
  by_hand, losses = ByHand(params, tx), []
  for batch in images:
    graphdef, _, rest = nnx.split((own_model, own_rngs), nnx.Param, ...)
    rest = as_pure(rest)  # Arrays, which the call below does not move.
    losses.append(nnx_loss(own_model, own_rngs, batch)[0])
    by_hand.step(lambda p, r=rest, b=batch: gradient(p, r, b))
    nnx.update(own_model, by_hand.params)
    nnx_train_step(model, optimizer, metrics, rngs, batch)
  by_hand.assert_followed_by(as_pure(nnx.state(model, nnx.Param)))
  for found, expected in ((model, own_model), (rngs, own_rngs)):
    others = nnx.state(found, (nnx.BatchStat, nnx.RngCount))
    assert jax.tree.leaves(others)
    assert_close(others, nnx.state(expected, (nnx.BatchStat, nnx.RngCount)))
  np.testing.assert_allclose(
    metrics.compute()["loss"], np.mean(losses), rtol=1e-5
  )


# NNX over a mesh.


class ShardedNetwork(nnx.Module):
  def __init__(self, hidden_sharding, rngs):
    init = nnx.initializers.lecun_normal()
    by = lambda *names: nnx.with_partitioning(init, names)
    self.up = nnx.Linear(4, 8, kernel_init=by(None, "model"), rngs=rngs)
    self.down = nnx.Linear(8, 3, kernel_init=by("model", None), rngs=rngs)
    self.out_sharding = hidden_sharding

  def __call__(self, x):
    return self.down(jnp.tanh(self.up(x)), out_sharding=self.out_sharding)


@nnx.jit
def sharded_train_step(model, optimizer, batch):
  def loss_fn(model):
    one_hot = jax.nn.one_hot(batch["label"], 3)
    return -jnp.mean(jax.nn.log_softmax(model(batch["image"])) * one_hot)

  loss, grads = optimizer.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)
  return loss


@jax.jit
@jax.grad
def two_layers_gradient(params, batch):
  hidden = batch["image"] @ params["up"]["kernel"] + params["up"]["bias"]
  down = params["down"]
  logits = jnp.tanh(hidden) @ down["kernel"] + down["bias"]
  return cross_entropy(logits, batch["label"]).mean() / 3


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_nnx_with_parameters_and_batch_over_a_mesh(images, kind):
  """The multi-device guide's kind, annotated parameters; 2 lines change."""
  axis_type = getattr(jax.sharding.AxisType, kind)
  mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
  tx = optax.adam(0.05)
  with set_mesh(mesh):
    model = ShardedNetwork(
      P("data") if kind == "Explicit" else None, nnx.Rngs(0)
    )
    own = jax.tree.map(np.asarray, as_pure(nnx.state(model, nnx.Param)))
    optimizer = fsam_optax.nnx.Optimizer(
      model, tx, wrt=nnx.Param, perturbation=perturbation()
    )
    rows = jax.NamedSharding(mesh, P("data"))
    for batch in images:
      loss = sharded_train_step(model, optimizer, jax.device_put(batch, rows))
    assert np.isfinite(loss)
  by_hand = ByHand(jax.tree.map(jnp.asarray, own), tx)
  for batch in images:
    by_hand.step(lambda p, batch=batch: two_layers_gradient(p, batch))
  by_hand.assert_followed_by(as_pure(nnx.state(model, nnx.Param)))
  average = optimizer.perturbation_state[0].ema
  for tree in (nnx.state(model, nnx.Param), average):
    assert tree["up"]["kernel"][...].sharding.spec == P(None, "model")
    assert len(tree["up"]["kernel"][...].sharding.device_set) == 8


# Adapters in NNX.


class Adapted(nnx.Module):
  def __init__(self, *, rngs):
    self.hidden = nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs)
    self.output = nnx.LoRALinear(8, 3, lora_rank=2, rngs=rngs)

  def __call__(self, x):
    return self.output(jnp.tanh(self.hidden(x)))


@nnx.jit
def adapter_step(model, optimizer, batch):
  def loss_fn(model):
    return cross_entropy(model(batch["image"]), batch["label"]).mean()

  _, grads = optimizer.value_and_grad(loss_fn)(model)
  optimizer.update(model, grads)


def test_nnx_adapters_over_a_frozen_base(images):
  """NNX's LoRA, with `wrt` the adapters' type; 2 lines change."""
  model, tx = Adapted(rngs=nnx.Rngs(0)), optax.adam(0.05)
  optimizer = fsam_optax.nnx.Optimizer(
    model, tx, wrt=nnx.LoRAParam, perturbation=perturbation()
  )
  is_base = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))
  pure = lambda which: as_pure(nnx.state(model, which))
  base = jax.tree.map(np.array, pure(is_base))
  assert len(jax.tree.leaves(base)) == 4

  def layer(weights, adapter, x):
    change = adapter["lora"]["lora_a"] @ adapter["lora"]["lora_b"]
    return x @ (weights["kernel"] + change) + weights["bias"]

  @jax.jit
  @jax.grad
  def gradient(adapters, batch):
    hidden = layer(base["hidden"], adapters["hidden"], batch["image"])
    logits = layer(base["output"], adapters["output"], jnp.tanh(hidden))
    return cross_entropy(logits, batch["label"]).mean()

  by_hand = ByHand(jax.tree.map(jnp.copy, pure(nnx.LoRAParam)), tx)
  for batch in images:
    by_hand.step(lambda p, batch=batch: gradient(p, batch))
    adapter_step(model, optimizer, batch)
  by_hand.assert_followed_by(pure(nnx.LoRAParam))
  jax.tree.map(np.testing.assert_array_equal, pure(is_base), base)


# Dense layers in fp8.


class Fp8Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)
    return nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp)(nn.tanh(x))


FP8_NETWORK = Fp8Network()


def fp8_loss(variables, batch):
  logits = FP8_NETWORK.apply(variables, batch["image"])
  return cross_entropy(logits, batch["label"]).mean()


fp8_gradient = jax.jit(jax.grad(fp8_loss))


@jax.jit
def fp8_train_step(state, batch):
  grad_fn = fsam_optax.value_and_grad(fp8_loss, state.perturbation)
  loss, grads, perturbation_state, _ = grad_fn(
    state.params, state.perturbation_state, batch
  )
  return state.apply_gradients(
    grads=grads, perturbation_state=perturbation_state
  ), loss


def test_linen_in_fp8_with_adamw(images):
  """Flax's fp8 guide: scales ride in the train state; 4 lines change."""
  variables = FP8_NETWORK.init(jax.random.key(0), images[0]["image"])
  scales = fp8_ops.OVERWRITE_WITH_GRADIENT
  tx = optax.adamw(0.02, eps=1e-4)
  state = fsam_optax.TrainState.create(
    apply_fn=FP8_NETWORK.apply,
    params=variables,
    tx=tx,
    perturbation=perturbation(),
  )
  own, ascent = variables, FriendlySam(RHO, 1.0, LMBDA)
  opt_state = tx.init(own["params"])
  for batch in images:
    state, loss = fp8_train_step(state, batch)
    np.testing.assert_allclose(loss, fp8_loss(own, batch), rtol=1e-4)
    weights = flat(own["params"])
    first = fp8_gradient(own, batch)
    moved = weights + ascent(flat(first["params"]), weights)
    second = fp8_gradient(
      {**own, "params": unflat(moved, own["params"])}, batch
    )
    difference = flat(second["params"]) - flat(first["params"])
    assert np.abs(difference).max() > 1e-3
    updates, opt_state = tx.update(second["params"], opt_state, own["params"])
    own = {
      "params": optax.apply_updates(own["params"], updates),
      scales: second[scales],
    }
  assert_close(state.params["params"], own["params"], 1e-4)
  assert_close(state.params[scales], own[scales], 1e-4)

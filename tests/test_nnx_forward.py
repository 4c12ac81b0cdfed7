"""Whatever the forward does to an NNX model, Flax's own loop does as well.

With the radius 0, both faces leave bit for bit the model, graph and arrays,
that the loop over ``nnx.value_and_grad`` leaves; the optimizer uncompiled to
rounding.
"""

import functools

import chex
from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from versions import as_pure

import fsam_optax

INPUTS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)


class Model(nnx.Module):
  """A layer whose features a subclass does something with."""

  wrt = nnx.Param

  def __init__(self):
    self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    self.prepare()

  def prepare(self):
    pass

  def __call__(self, inputs):
    features = self.linear(inputs)
    return self.see(features, jax.lax.stop_gradient(features.mean(0)))


class CreatesVariables(Model):
  def see(self, features, mean):
    self.regularizer = nnx.Intermediate(jnp.sum(features**2))
    self.sow(nnx.Intermediate, "features", features)
    self.linear.sow(nnx.Intermediate, "mean", mean)
    features = self.perturb("shift", features)
    return features + 1e-2 * self.regularizer[...]


class MovesAnArray(Model):
  def prepare(self):
    self.mean = nnx.data(jnp.zeros(2))
    self.nested = nnx.data({"count": jnp.zeros([], int), "kept": jnp.ones(2)})

  def see(self, features, mean):
    features = features - self.mean
    self.mean = 0.9 * self.mean + 0.1 * mean
    self.nested["count"] += 1
    return features * self.nested["kept"]


class CountsInPython(Model):
  def prepare(self):
    self.calls = 0

  def see(self, features, mean):
    self.calls += 1
    return features / self.calls


class Pops(Model):
  def prepare(self):
    self.bias = nnx.Variable(jnp.ones(2))
    self.cache = nnx.Cache(jnp.ones(2))

  def see(self, features, mean):
    if hasattr(self, "bias"):
      features = features + self.bias[...]
      del self.bias
      nnx.pop(self, nnx.Cache)
    return features


class TrainsStatistics(Model):
  wrt = nnx.Any(nnx.Param, nnx.BatchStat)

  def prepare(self):
    self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(1))

  def see(self, features, mean):
    return self.norm(features)


class MovesAParameter(Model):
  def prepare(self):
    self.codebook = nnx.Param(jnp.ones(2))

  def see(self, features, mean):
    output = features * self.codebook[...]
    self.codebook[...] = 0.9 * self.codebook[...] + 0.1 * mean
    return output


class KeepsAnAverageOfAParameter(Model):
  """That begins as the parameter's own array."""

  def prepare(self):
    self.scale = nnx.Param(jnp.ones(2))
    self.average = nnx.Variable(self.scale[...])

  def see(self, features, mean):
    scale = jax.lax.stop_gradient(self.scale[...])
    output = features * self.scale[...] * self.average[...]
    self.average[...] = 0.9 * self.average[...] + 0.1 * scale
    return output


class SwapsItsParts(Model):
  def prepare(self):
    self.scale = nnx.Param(jnp.ones(2))
    self.other = nnx.Variable(jnp.full(2, 2.0))
    self.layers = nnx.List([self.linear])

  def see(self, features, mean):
    output = features * self.scale[...] + self.other[...]
    self.other, self.spare = nnx.Variable(mean), self.other
    self.spare.set_metadata(seen=True)
    self.layers.append(nnx.Dropout(0.5, rngs=nnx.Rngs(2)))
    return self.layers[-1](output)


class GrowsACache(Model):
  def prepare(self):
    self.cache = nnx.Cache(jnp.zeros((0, 2)))

  def see(self, features, mean):
    grown = jnp.concatenate([self.cache[...], mean[None]])
    self.cache.copy_from(nnx.Cache(grown))
    return features + self.cache[...].mean(0)


MODELS = {cls.__name__: cls for cls in Model.__subclasses__()}
if not hasattr(nnx.Variable, "set_metadata"):
  del MODELS["SwapsItsParts"]  # Flax 0.11 lets no Variable change its metadata.


class DoesItAll(Model):
  """What each of the others does but one, which trains what others make."""

  def prepare(self):
    for name, cls in MODELS.items():
      if name != "TrainsStatistics":
        setattr(self, name, cls())

  def see(self, features, mean):
    for name in MODELS:
      if hasattr(self, name):
        features = getattr(self, name).see(features, mean)
    return features


def loss_fn(model, inputs, tracker):
  output = model(inputs)
  tracker.update(values=output)
  tracker.last = nnx.Intermediate(output)
  return jnp.mean((output - 1.0) ** 2)


# One of each, so that no step is compiled twice.
SGD = optax.sgd(0.1, momentum=0.9)
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.0)
CHAIN = optax.chain(fsam_optax.fsam(rho=0.0), SGD)


def plain_step(model, optimizer, inputs, tracker):
  loss, grads = nnx.value_and_grad(
    loss_fn, argnums=nnx.DiffState(0, model.wrt)
  )(model, inputs, tracker)
  optimizer.update(model, grads)
  return loss


def two_pass_step(model, optimizer, inputs, tracker):
  loss, grads = optimizer.value_and_grad(loss_fn)(model, inputs, tracker)
  optimizer.update(model, grads)
  return loss


def chained_step(model, optimizer, inputs, tracker):
  fn = fsam_optax.nnx.value_and_grad(loss_fn, wrt=model.wrt)
  loss, grads, grad_fn = fn(model, inputs, tracker)
  optimizer.update(model, grads, grad_fn=grad_fn)
  return loss


LOOPS = {
  "plain": (plain_step, lambda m: nnx.Optimizer(m, SGD, wrt=m.wrt)),
  "optimizer": (
    two_pass_step,
    lambda m: fsam_optax.nnx.Optimizer(
      m, SGD, wrt=m.wrt, perturbation=PERTURBATION
    ),
  ),
  "chain": (chained_step, lambda m: nnx.Optimizer(m, CHAIN, wrt=m.wrt)),
}


@functools.cache
def trained(loop, name, is_compiled):
  """What two steps leave: the losses, and the graph of all that moves."""
  step, make_optimizer = LOOPS[loop]
  step = nnx.jit(step) if is_compiled else step
  model = DoesItAll() if name == "DoesItAll" else MODELS[name]()
  tracker = nnx.metrics.Average()
  kept = model.linear, tracker
  optimizer = make_optimizer(model)
  losses = [step(model, optimizer, INPUTS + t, tracker) for t in range(2)]
  assert model.linear is kept[0]
  graphdef, state = nnx.split((model, tracker))
  is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
  arrays = [
    jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state)
  ]
  return graphdef, (losses, arrays)


@pytest.mark.filterwarnings("ignore:[^.]*Module:DeprecationWarning")
@pytest.mark.parametrize("name", ["TrainsStatistics", "DoesItAll"])
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("loop", ["optimizer", "chain"])
def test_the_forward_leaves_what_the_plain_loop_leaves(loop, name, is_compiled):
  graphdef, expected = trained("plain", name, is_compiled)
  found_graphdef, found = trained(loop, name, is_compiled)
  assert found_graphdef == graphdef
  check = chex.assert_trees_all_equal
  if loop == "optimizer" and not is_compiled:
    # The operations of its recorded pass run one by one, and JAX runs some of
    # them as one compiled function where nothing is recorded.
    check = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
  check(found, expected)


def small_loss(model, inputs):
  return jnp.mean((model(inputs) - 1.0) ** 2)


@pytest.mark.parametrize(
  ("name", "found"),
  [
    ("CreatesVariables", "features"),
    ("CountsInPython", "calls"),
    ("Pops", "bias"),
    ("MovesAParameter", "codebook"),
    ("GrowsACache", "cache"),
  ],
)
@pytest.mark.filterwarnings("ignore:[^.]*Module:DeprecationWarning")
def test_what_no_micro_batch_can_hand_to_the_next_is_named(name, found):
  model = MODELS[name]()
  optimizer = LOOPS["optimizer"][1](model)
  fn = optimizer.value_and_grad(small_loss, num_microbatches=2)
  message = f"`loss_fn` must .*`num_microbatches`, got a change of .*{found}"
  with pytest.raises(ValueError, match=message):
    fn(model, INPUTS)


def test_replicas_average_what_the_forward_moved():
  """A parameter of codes, an array and a new Variable; the count agrees."""

  class Moves(MovesAnArray):
    def see(self, features, mean):
      self.linear.bias[...] = mean
      self.latest = nnx.Intermediate(mean)
      return super().see(features, mean)

  model, whole = Moves(), Moves()
  optimizer = LOOPS["optimizer"][1](model)

  def on_replica(inputs):
    replica, own = nnx.clone((model, optimizer))
    own.value_and_grad(small_loss, axis_name="batch")(replica, inputs)
    return as_pure(nnx.state(replica))

  both = jax.jit(jax.vmap(on_replica, axis_name="batch"))
  found = both(INPUTS.reshape(2, 2, 3))
  whole(INPUTS)
  for i in range(2):
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], found),
      as_pure(nnx.state(whole)),
      rtol=1e-5,
    )

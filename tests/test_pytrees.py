"""Any pytree can be the parameters: Equinox modules, lists, one array."""

import dataclasses

import chex
import equinox as eqx
import faces
import flax
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

STEPS = 20


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  inputs = jnp.asarray(rng.normal(size=(16, 3)), jnp.float32)
  return inputs, jnp.tanh(inputs @ jnp.ones((3, 2)))


def train(loss_fn, params, batch, passes=faces.value_and_grad):
  """Losses and parameters of a run, in both forms: a chain and two passes."""
  batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS), batch)
  perturbation = fsam_optax.friendly_perturbation(rho=0.05)
  base = optax.sgd(0.1, momentum=0.9)
  for face in (faces.chain, passes):
    (trained, *_), seen = faces.train(
      face, loss_fn, params, batches, base, perturbation
    )
    yield seen.loss, trained


def dict_loss(params, batch):
  """Two layers as a plain dict of arrays."""
  hidden = jnp.tanh(batch[0] @ params["w1"].T + params["b1"])
  return jnp.mean((hidden @ params["w2"].T + params["b2"] - batch[1]) ** 2)


@pytest.fixture(scope="module")
def model():
  key = jax.random.key(0)
  return eqx.nn.MLP(3, 2, 8, depth=1, activation=jnp.tanh, key=key)


def arrays_of(model):
  first, second = model.layers
  return {
    "w1": first.weight,
    "b1": first.bias,
    "w2": second.weight,
    "b2": second.bias,
  }


@pytest.fixture(scope="module")
def references(model, batch):
  """What every run below must equal: the arrays in a plain dict."""
  return list(train(dict_loss, arrays_of(model), batch))


def test_an_equinox_module_trains_as_its_arrays_in_a_dict(
  model, batch, references
):
  params, static = eqx.partition(model, eqx.is_inexact_array)
  # Functions and sizes are static: where they were, there is None.
  assert params.activation is None

  def loss_fn(params, batch):
    outputs = jax.vmap(eqx.combine(params, static))(batch[0])
    return jnp.mean((outputs - batch[1]) ** 2)

  runs = train(loss_fn, params, batch)
  for (losses, trained), (expected_losses, expected) in zip(
    runs, references, strict=True
  ):
    assert losses[-1] < 0.3 * losses[0]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    chex.assert_trees_all_close(arrays_of(trained), expected, rtol=1e-4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A node of the user's own, with a static field."""

  weight: jax.Array
  bias: jax.Array
  name: str = dataclasses.field(metadata={"static": True})


CONTAINERS = {
  "frozen dict": flax.core.freeze,
  "tuple of pairs": lambda p: ((p["w1"], p["b1"]), (p["w2"], p["b2"])),
  "None leaves": lambda p: [p["w1"], None, p["b1"], [], (p["w2"], p["b2"])],
  "own nodes": lambda p: (
    Layer(p["w1"], p["b1"], "hidden"),
    Layer(p["w2"], p["b2"], "output"),
  ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_container_does_not_change_the_run(
  model, batch, references, container
):
  contain = CONTAINERS[container]

  def loss_fn(params, batch):
    if not isinstance(params, flax.core.FrozenDict):
      names = ("w1", "b1", "w2", "b2")
      params = dict(zip(names, jax.tree.leaves(params), strict=True))
    return dict_loss(params, batch)

  params = arrays_of(model)
  runs = train(loss_fn, contain(params), batch)
  for (losses, trained), (expected_losses, expected) in zip(
    runs, references, strict=True
  ):
    assert jax.tree.structure(trained) == jax.tree.structure(contain(params))
    # The norm sums the leaves in their order, which the container decides.
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    chex.assert_trees_all_close(trained, contain(expected), rtol=1e-4)


def test_one_array_is_a_pytree(batch):
  loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
  alone = train(loss_fn, jnp.zeros((3, 2)), batch, faces.train_step)
  boxed = train(
    lambda p, batch: loss_fn(p["w"], batch), {"w": jnp.zeros((3, 2))}, batch
  )
  for (losses, w), (_, params) in zip(alone, boxed, strict=True):
    assert losses[-1] < losses[0]
    chex.assert_trees_all_close(w, params["w"], rtol=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_python_numbers_are_parameters_too(adaptive):
  """At w = 3 the gradient is 6; the perturbation .5, or .5 w = 1.5."""
  params = {"w": 3.0}
  grad_fn = jax.grad(lambda p: p["w"] ** 2)
  expected = 2 * (3 + (0.5 * 3 if adaptive else 0.5))
  perturbation = fsam_optax.friendly_perturbation(0.5, adaptive=adaptive)
  fn = fsam_optax.value_and_grad(lambda p: p["w"] ** 2, perturbation)
  _, grads, _, _ = fn(params, perturbation.init(params))
  link = fsam_optax.fsam(0.5, adaptive=adaptive, checked=True)
  updates, _ = link.update(
    grad_fn(params), link.init(params), params, grad_fn=grad_fn
  )
  np.testing.assert_allclose([grads["w"], updates["w"]], expected, rtol=1e-6)

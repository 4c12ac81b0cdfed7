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


def train(face, loss_fn, params, batch):
  """Losses and parameters of a run."""
  batches = jax.tree.map(lambda x: jnp.stack([x] * STEPS), batch)
  perturbation = fsam_optax.friendly_perturbation(rho=0.05)
  base = optax.sgd(0.1, momentum=0.9)
  (trained, *_), seen = faces.train(
    face, loss_fn, params, batches, base, perturbation
  )
  return seen.loss, trained


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
def reference(model, batch):
  """What every run below must equal: the arrays in a plain dict."""
  return train(faces.chain, dict_loss, arrays_of(model), batch)


@pytest.mark.parametrize("face", [faces.chain, faces.value_and_grad])
def test_an_equinox_module_trains_as_its_arrays_in_a_dict(
  model, batch, reference, face
):
  params, static = eqx.partition(model, eqx.is_inexact_array)
  # Functions and sizes are static: where they were, there is None.
  assert params.activation is None

  def loss_fn(params, batch):
    outputs = jax.vmap(eqx.combine(params, static))(batch[0])
    return jnp.mean((outputs - batch[1]) ** 2)

  losses, trained = train(face, loss_fn, params, batch)
  assert losses[-1] < 0.3 * losses[0]
  np.testing.assert_allclose(losses, reference[0], rtol=1e-4)
  chex.assert_trees_all_close(arrays_of(trained), reference[1], rtol=1e-4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A node of the user's own, with a static field."""

  weight: jax.Array
  bias: jax.Array
  name: str = dataclasses.field(metadata={"static": True})


@pytest.mark.parametrize("face", [faces.chain, faces.value_and_grad])
def test_the_container_does_not_change_the_run(model, batch, reference, face):
  """A frozen dict of a list, with leaves of None, and of nodes of one's own."""
  contain = lambda p: flax.core.freeze(
    {
      "1": [p["w1"], None, p["b1"], ()],
      "2": Layer(p["w2"], p["b2"], "output"),
    }
  )

  def loss_fn(params, batch):
    names = ("w1", "b1", "w2", "b2")
    leaves = jax.tree.leaves(params)
    return dict_loss(dict(zip(names, leaves, strict=True)), batch)

  params = arrays_of(model)
  losses, trained = train(face, loss_fn, contain(params), batch)
  assert jax.tree.structure(trained) == jax.tree.structure(contain(params))
  # The norm sums the leaves in their order, which the container decides.
  np.testing.assert_allclose(losses, reference[0], rtol=1e-4)
  chex.assert_trees_all_close(trained, contain(reference[1]), rtol=1e-4)


def test_one_array_is_a_pytree(batch):
  loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
  in_a_dict = lambda p, batch: loss_fn(p["w"], batch)
  w = jnp.zeros((3, 2))
  losses, alone = train(faces.train_step, loss_fn, w, batch)
  _, boxed = train(faces.chain, in_a_dict, {"w": w}, batch)
  assert losses[-1] < losses[0]
  chex.assert_trees_all_close(alone, boxed["w"], rtol=1e-4)


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

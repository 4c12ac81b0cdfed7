"""Any pytree can be the parameters: Equinox modules, one array, numbers."""

import chex
import equinox as eqx
import faces
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax


def train(face, loss_fn, params, problem):
  """Losses and parameters of five steps."""
  batches = jax.tree.map(lambda x: x[:5], problem.batches)
  perturbation = fsam_optax.friendly_perturbation(rho=0.05)
  base = optax.sgd(0.1, momentum=0.9)
  (trained, *_), seen = faces.train(
    face, loss_fn, params, batches, base, perturbation
  )
  return seen.loss, trained


def test_an_equinox_module_trains_as_a_list_of_its_arrays(problem):
  model = eqx.nn.MLP(3, 2, 8, depth=1, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_inexact_array)

  def loss_fn(params, batch):
    outputs = jax.vmap(eqx.combine(params, static))(batch[0])
    return jnp.mean((outputs - batch[1]) ** 2)

  losses, trained = train(faces.value_and_grad, loss_fn, params, problem)
  leaves, structure = jax.tree.flatten(params)
  of_list = lambda leaves, b: loss_fn(jax.tree.unflatten(structure, leaves), b)
  expected = train(faces.chain, of_list, leaves, problem)
  found = losses, jax.tree.leaves(trained)
  chex.assert_trees_all_close(found, expected, rtol=1e-4)


def test_one_array_is_a_pytree(problem):
  loss_fn = lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
  in_a_dict = lambda p, batch: loss_fn(p["w"], batch)
  w = jnp.zeros((3, 2))
  _, alone = train(faces.train_step, loss_fn, w, problem)
  _, boxed = train(faces.chain, in_a_dict, {"w": w}, problem)
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

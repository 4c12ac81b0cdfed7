"""Any pytree can be the parameters: Equinox modules, lists, one array."""

import dataclasses

import chex
import equinox as eqx
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


def train(loss_fn, params, batch):
  """Losses and parameters of a run, in both forms: a chain and two passes."""
  base = optax.sgd(0.1, momentum=0.9)
  tx = optax.chain(fsam_optax.fsam(rho=0.05), base)
  perturbation = fsam_optax.friendly_perturbation(rho=0.05)
  fn = fsam_optax.value_and_grad(loss_fn, perturbation)

  def chained(carry, _):
    params, state = carry
    grad_fn = jax.grad(lambda p: loss_fn(p, batch))
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), state), loss_fn(params, batch)

  def two_passes(carry, _):
    params, opt_state, state = carry
    loss, grads, state, _ = fn(params, state, batch)
    updates, opt_state = base.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, state), loss

  @jax.jit
  def run(params):
    (chain_params, _), chain_losses = jax.lax.scan(
      chained, (params, tx.init(params)), length=STEPS
    )
    carry = params, base.init(params), perturbation.init(params)
    (pass_params, *_), pass_losses = jax.lax.scan(
      two_passes, carry, length=STEPS
    )
    return (chain_losses, chain_params), (pass_losses, pass_params)

  return run(params)


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
  return train(dict_loss, arrays_of(model), batch)


def test_the_equinox_example_trains(model, batch):
  params, static = eqx.partition(model, eqx.is_inexact_array)
  tx = optax.chain(fsam_optax.fsam(rho=0.05), optax.sgd(0.1, momentum=0.9))
  state = tx.init(params)

  @jax.jit
  def step(params, state, x, y):
    loss = lambda p: jnp.mean((jax.vmap(eqx.combine(p, static))(x) - y) ** 2)
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = tx.update(grads, state, params, grad_fn=jax.grad(loss))
    return eqx.apply_updates(params, updates), state, value

  losses = []
  for _ in range(STEPS):
    params, state, value = step(params, state, *batch)
    losses.append(value)
  model = eqx.combine(params, static)
  assert losses[-1] < 0.3 * losses[0]
  np.testing.assert_array_equal(jax.vmap(model)(batch[0]).shape, (16, 2))


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


def test_filter_grad_gives_the_gradient_that_the_chain_takes(model, batch):
  params, static = eqx.partition(model, eqx.is_inexact_array)
  tx = fsam_optax.fsam(rho=0.05)

  @eqx.filter_grad
  def filtered(model):
    return jnp.mean((jax.vmap(model)(batch[0]) - batch[1]) ** 2)

  grad_fn = lambda params: filtered(eqx.combine(params, static))
  updates, _ = jax.jit(
    lambda p: tx.update(grad_fn(p), tx.init(p), p, grad_fn=grad_fn)
  )(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
  """A node of the user's own, with a static field."""

  weight: jax.Array
  bias: jax.Array
  name: str = dataclasses.field(metadata={"static": True})


CONTAINERS = {
  "list": lambda p: [p["w1"], p["b1"], p["w2"], p["b2"]],
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
    w1, b1, w2, b2 = jax.tree.leaves(params)
    return dict_loss({"w1": w1, "b1": b1, "w2": w2, "b2": b2}, batch)

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
  alone = train(loss_fn, jnp.zeros((3, 2)), batch)
  boxed = train(
    lambda p, batch: loss_fn(p["w"], batch), {"w": jnp.zeros((3, 2))}, batch
  )
  for (losses, w), (_, params) in zip(alone, boxed, strict=True):
    assert losses[-1] < losses[0]
    chex.assert_trees_all_close(w, params["w"], rtol=1e-5)


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

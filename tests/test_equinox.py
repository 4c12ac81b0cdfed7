"""Equinox's BatchNorm: its state moves once a step, at the clean weights."""

import equinox as eqx
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax

RHO, LMBDA, MOMENTUM, LEARNING_RATE, STEPS = 0.1, 0.6, 0.9, 0.1, 3


def make_model():
  keys = jax.random.split(jax.random.key(0))
  return eqx.nn.make_with_state(eqx.nn.Sequential)(
    [
      eqx.nn.Linear(3, 4, key=keys[0]),
      eqx.nn.BatchNorm(4, axis_name="rows", momentum=MOMENTUM, mode="batch"),
      eqx.nn.Linear(4, "scalar", key=keys[1]),
    ]
  )


def make_batches():
  draw = np.random.default_rng(0).normal
  return [
    (
      np.asarray(draw(size=(8, 3)), np.float32),
      np.asarray(draw(size=8), np.float32),
    )
    for _ in range(STEPS)
  ]


def plain_loss(params, batch):
  """The same network over a dict, from the equations."""
  x, y = batch
  hidden = x @ params["hidden"].T + params["hidden_bias"]
  mean, variance = hidden.mean(0), hidden.var(0)
  hidden = (hidden - mean) / jnp.sqrt(variance + 1e-5)
  hidden = params["scale"] * hidden + params["shift"]
  outputs = hidden @ params["output"][0] + params["output_bias"][0]
  return jnp.mean((outputs - y) ** 2), (mean, variance)


def plain(params):
  hidden, norm, output = params.layers
  return {
    "hidden": hidden.weight,
    "hidden_bias": hidden.bias,
    "scale": norm.weight,
    "shift": norm.bias,
    "output": output.weight,
    "output_bias": output.bias,
  }


def by_hand(params, batches):
  """Weights and statistics after each step of F-SAM with gradient descent."""
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in tree.values()))
  gradient = jax.grad(plain_loss, has_aux=True)
  average = None
  # As Equinox starts them; it takes the start out again where it reads them.
  statistics = np.zeros(4), np.ones(4)
  for t, batch in enumerate(batches):
    g, seen = gradient(params, batch)
    if t == 0:
      direction, average = g, g
    else:
      direction = {k: g[k] - average[k] for k in g}
      average = {k: LMBDA * average[k] + (1 - LMBDA) * g[k] for k in g}
    statistics = [
      MOMENTUM * old + (1 - MOMENTUM) * new
      for old, new in zip(statistics, seen, strict=True)
    ]
    length = norm(direction)
    perturbed = {k: params[k] + RHO * direction[k] / length for k in direction}
    g, _ = gradient(perturbed, batch)
    params = {k: params[k] - LEARNING_RATE * g[k] for k in g}
    yield params, statistics


def test_the_statistics_are_those_of_the_clean_weights_once_a_step():
  model, state = make_model()
  params, static = eqx.partition(model, eqx.is_inexact_array)
  perturbation = fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA)
  tx = optax.sgd(LEARNING_RATE)

  def loss_fn(params, batch, state):
    network = jax.vmap(
      eqx.combine(params, static), (0, None), (0, None), axis_name="rows"
    )
    outputs, state = network(batch[0], state)
    return jnp.mean((outputs - batch[1]) ** 2), state

  fn = fsam_optax.value_and_grad(loss_fn, perturbation, has_aux=True)

  @eqx.filter_jit
  def step(params, state, opt_state, perturbation_state, batch):
    (_, state), grads, perturbation_state, _ = fn(
      params, perturbation_state, batch, state
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = eqx.apply_updates(params, updates)
    return params, state, opt_state, perturbation_state

  opt_state, perturbation_state = tx.init(params), perturbation.init(params)
  batches = make_batches()
  expected = by_hand(plain(params), batches)
  for count, (batch, (weights, statistics)) in enumerate(
    zip(batches, expected, strict=True), start=1
  ):
    params, state, opt_state, perturbation_state = step(
      params, state, opt_state, perturbation_state, batch
    )
    for name, found in plain(params).items():
      np.testing.assert_allclose(found, weights[name], rtol=1e-4, atol=1e-5)
    norm = model.layers[1]
    assert int(state.get(norm.batch_counter)) == count
    for found, wanted in zip(
      state.get(norm.batch_state_index), statistics, strict=True
    ):
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)

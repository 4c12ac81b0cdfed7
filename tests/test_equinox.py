"""Equinox's BatchNorm: its state moves once a step, at the clean weights."""

from by_hand import LMBDA
from by_hand import RHO
from by_hand import ByHand
import equinox as eqx
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax

MOMENTUM, STEPS = 0.9, 3


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


def test_the_statistics_are_those_of_the_clean_weights_once_a_step():
  model, state = make_model()
  params, static = eqx.partition(model, eqx.is_inexact_array)
  perturbation = fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA)
  tx = optax.sgd(0.1)

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
  by_hand = ByHand(plain(params), tx)
  # As Equinox starts them; it takes the start out again where it reads them.
  statistics = np.zeros(4), np.ones(4)
  gradient = jax.grad(plain_loss, has_aux=True)
  for count, batch in enumerate(make_batches(), start=1):
    _, seen = gradient(by_hand.params, batch)
    statistics = [
      MOMENTUM * old + (1 - MOMENTUM) * new
      for old, new in zip(statistics, seen, strict=True)
    ]
    by_hand.step(lambda p, batch=batch: gradient(p, batch)[0])
    params, state, opt_state, perturbation_state = step(
      params, state, opt_state, perturbation_state, batch
    )
    norm = model.layers[1]
    assert int(state.get(norm.batch_counter)) == count
    for found, wanted in zip(
      state.get(norm.batch_state_index), statistics, strict=True
    ):
      np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
  by_hand.assert_followed_by(plain(params), tolerance=2e-5)

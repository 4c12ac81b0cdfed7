"""Schedules of rho, sigma and lmbda advance once per optimizer step."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

RHO = optax.linear_schedule(0.1, 0.5, transition_steps=4)


def loss_fn(w, batch):
  return jnp.mean((batch @ w) ** 2)


def radii(options, steps=5):
  perturbation = fsam_optax.friendly_perturbation(rho=RHO, sigma=0.5)
  fn = jax.jit(fsam_optax.value_and_grad(loss_fn, perturbation, **options))
  w, norms = jnp.ones(3), []
  state = perturbation.init(w)
  for _ in range(steps):
    _, _, state, info = fn(w, state, jnp.eye(6, 3) + 1)
    norms.append(float(info.perturbation_norm))
  return norms


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"num_microbatches": 3},
    {"num_microbatches": 3, "sync_perturbation": False},
  ],
  ids=str,
)
def test_the_radius_advances_once_a_step(options):
  expected = [0.1, 0.2, 0.3, 0.4, 0.5]
  np.testing.assert_allclose(radii(options), expected, rtol=1e-5)


def test_gated_steps_advance_the_radius_too():
  expected = [0.1, 0.0, 0.3, 0.0, 0.5]
  np.testing.assert_allclose(radii({"every": 2}), expected, rtol=1e-5)


def test_injected_schedules_equal_plain_ones():
  sigma = optax.linear_schedule(1.0, 0.0, transition_steps=3)
  lmbda = optax.piecewise_constant_schedule(0.9, {2: 0.5})
  hyperparameters = {"rho": RHO, "sigma": sigma, "lmbda": lmbda}
  plain = fsam_optax.fsam(**hyperparameters)
  injected = optax.inject_hyperparams(fsam_optax.fsam)(**hyperparameters)
  w, batch = jnp.ones(3), jnp.eye(6, 3) + 1
  grad_fn = lambda w: jax.grad(loss_fn)(w, batch)
  states = [plain.init(w), injected.init(w)]
  for _ in range(5):
    updates = []
    for i, tx in enumerate((plain, injected)):
      u, states[i] = tx.update(grad_fn(w), states[i], w, grad_fn=grad_fn)
      updates.append(u)
    np.testing.assert_allclose(*updates, rtol=1e-5)
    w = w - 0.1 * updates[0]
  np.testing.assert_allclose(states[1].hyperparams["sigma"], sigma(4))


def test_the_radius_follows_the_learning_rate_between_its_ends():
  learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.4, 10, 50)
  rho = fsam_optax.radius_schedule(
    learning_rate, rho_min=0.05, rho_max=0.2, learning_rate_max=0.4
  )
  for t in (0, 5, 10, 30, 50, 99):
    share = float(learning_rate(t)) / 0.4
    np.testing.assert_allclose(rho(t), 0.05 + 0.15 * share, rtol=1e-5)


def test_the_radius_does_not_leave_its_ends():
  rho = fsam_optax.radius_schedule(
    lambda t: 0.1 * t,
    rho_min=0.1,
    rho_max=0.3,
    learning_rate_min=0.2,
    learning_rate_max=0.4,
  )
  np.testing.assert_allclose([rho(0), rho(9)], [0.1, 0.3], rtol=1e-6)


def test_eta_moves_weights_at_zero_in_the_adaptive_metric():
  w, g = jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0])
  for eta, expected in [
    (0.0, np.array([0.0, 4.0]) / 2.0),
    (0.5, np.array([0.25, 6.25]) / np.sqrt(0.25 + 6.25)),
  ]:
    tx = fsam_optax.scale_to_radius(0.1, adaptive=True, eta=eta)
    epsilon, state = tx.update(g, tx.init(w), w)
    np.testing.assert_allclose(epsilon, 0.1 * expected, rtol=1e-6)
    np.testing.assert_allclose(
      state.perturbation_norm, np.linalg.norm(0.1 * expected), rtol=1e-6
    )

"""The cheap forms, against NumPy on a quadratic, and their tables."""

from faces import state_of
from jax import numpy as jnp
import numpy as np
import optax
import pytest

from fsam_optax.experiments.studies import cheap_forms

RATE, RHO = 0.1, 0.05
SCALES = np.array([1.0, 3.0, 0.5])
TARGETS = np.random.default_rng(0).normal(size=(12, 3))


def loss_fn(params, model_state, batch, rng):
  del rng
  loss = 0.5 * jnp.sum(jnp.asarray(SCALES) * (params["w"] - batch) ** 2)
  return loss, (model_state, {})


def gradient(w, target):
  return SCALES * (w - target)


def trained(name):
  """The weights of each step, and the last state."""
  arm = cheap_forms.ARMS[name]
  state = state_of({"w": jnp.ones(3)}, arm.perturbation(RHO), optax.sgd(RATE))
  step = arm.step(loss_fn, steps=100)
  weights = []
  for target in TARGETS:
    state, _ = step(state, jnp.asarray(target))
    weights.append(np.asarray(state.params["w"]))
  return np.array(weights), state


def test_along_the_momentum_it_ascends_by_gradients_of_before(x64):
  """MSAM: along the sum that SGD's momentum is, which costs no gradient."""
  del x64
  w, trace, expected = np.ones(3), np.zeros(3), []
  for target in TARGETS:
    norm = np.linalg.norm(trace)
    perturbed = w + (RHO * trace / norm if norm else 0)
    g = gradient(perturbed, target)
    trace = 0.9 * trace + g
    w = w - RATE * g
    expected.append(w)
  found, _ = trained("along minus the momentum (MSAM)")
  np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_the_gate_opens_where_the_gradient_is_longer_than_before(x64):
  del x64
  w, mean, average, ascents, expected = np.ones(3), None, None, 0, []
  for target in TARGETS:
    g = gradient(w, target)
    square = g @ g
    mean = square if mean is None else mean
    direction = g if average is None else g - average
    average = g if average is None else 0.9 * average + 0.1 * g
    if square > mean:
      ascents += 1
      g = gradient(w + RHO * direction / np.linalg.norm(direction), target)
    mean = 0.9 * mean + 0.1 * square
    w = w - RATE * g
    expected.append(w)
  assert 2 < ascents < len(TARGETS) - 2
  found, state = trained("at long gradients (AE-SAM)")
  np.testing.assert_allclose(found, expected, rtol=1e-10)
  assert state.perturbation_state.memory[1] == ascents
  assert state.perturbation_state.count == len(TARGETS)


def test_the_late_form_ascends_at_the_end_alone():
  arm = cheap_forms.ARMS["in the last 30 %, `start`"]
  assert arm.gradients == 1 + arm.last == pytest.approx(1.3)
  arm = arm._replace(make_step=lambda loss_fn, **options: options)
  assert arm.step(loss_fn, steps=160)["start"] == 112


def test_every_form_has_its_gradients_counted():
  """At most those of F-SAM, at least one; a late form the fraction more."""
  for name, arm in cheap_forms.ARMS.items():
    assert 1 <= arm.gradients <= 2, name
    fraction = arm.options.get("ascent_fraction", 1)
    every = arm.options.get("every", 1)
    if arm.options.keys() & {"ascent_fraction", "every"}:
      assert arm.gradients == 1 + fraction / every, name

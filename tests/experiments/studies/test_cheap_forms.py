"""The cheap forms of the benchmark, against NumPy on a quadratic."""

import pathlib
import sys

from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import pareto

RATE, RHO = 0.1, 0.05
SCALES = np.array([1.0, 3.0, 0.5])
TARGETS = np.random.default_rng(0).normal(size=(12, 3))


def loss_fn(params, model_state, batch, rng):
  del rng
  loss = 0.5 * jnp.sum(jnp.asarray(SCALES) * (params["w"] - batch) ** 2)
  return loss, (model_state, {})


def gradient(w, target):
  return SCALES * (w - target)


def trained(name, **options):
  """The weights of each step, and the last state."""
  arm = pareto.ARMS[name]
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params={"w": jnp.ones(3)},
    tx=optax.sgd(RATE),
    perturbation=arm.perturbation(RHO),
  )
  step = arm.make_step(loss_fn, jit=False, **arm.options, **options)
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
  found, _ = trained("along the momentum")
  np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["SAM", "F-SAM"])
def test_the_gate_opens_where_the_gradient_is_longer_than_before(name, x64):
  del x64
  w, mean, average, ascents, expected = np.ones(3), None, None, 0, []
  for target in TARGETS:
    g = gradient(w, target)
    square = g @ g
    mean = square if mean is None else mean
    direction = g
    if name == "F-SAM" and average is not None:
      direction = g - average
    average = g if average is None else 0.9 * average + 0.1 * g
    if square > mean:
      ascents += 1
      g = gradient(w + RHO * direction / np.linalg.norm(direction), target)
    mean = 0.9 * mean + 0.1 * square
    w = w - RATE * g
    expected.append(w)
  assert 2 < ascents < len(TARGETS) - 2
  found, state = trained(f"{name}, at long gradients")
  np.testing.assert_allclose(found, expected, rtol=1e-10)
  assert state.perturbation_state.ascents == ascents
  assert state.perturbation_state.steps == len(TARGETS)


@pytest.mark.parametrize("share", [10, 20, 30])
def test_late_forms_ascend_at_the_end_alone(share):
  pool = pareto.load("digits")
  arm = pareto.ARMS[f"F-SAM, last {share} %"]
  assert arm.gradients == 1 + arm.last == pytest.approx(1 + share / 100)
  seen = {}

  def make_step(loss_fn, **options):
    seen.update(options)
    return fsam_optax.make_train_step(loss_fn, **options)

  pareto.trainer_of(arm._replace(make_step=make_step), pool, "mlp", epochs=20)
  steps = 20 * (pool.train_size // pareto.BATCH_SIZE)
  assert seen["start"] == pytest.approx((1 - share / 100) * steps, abs=0.5)


@pytest.mark.parametrize("peak", [0.02, 5.0])
def test_a_ladder_is_widened_beyond_the_end_at_which_its_best_is(peak):
  evaluated = []

  def evaluate(values):
    evaluated.append(len(values))
    return -np.abs(np.log(values / peak))

  ladder = np.array(pareto.RADII)
  found = evaluate(ladder)
  best = ladder[np.argmax(found)]
  assert best in (ladder[0], ladder[-1])
  ladder, found = pareto.widen(ladder, found, best, evaluate)
  np.testing.assert_allclose(ladder[1:] / ladder[:-1], 1.25)
  np.testing.assert_array_equal(found, evaluate(ladder))
  assert evaluated == [12, 12, 24]
  assert 0 < np.argmax(found) < 23
  assert ladder[np.argmax(found)] == pytest.approx(peak, rel=0.13)


@pytest.mark.parametrize("peak", [0.15, 0.3, 0.7, 5.0])
def test_the_window_moves_on_until_its_best_lies_inside(peak):
  """More seeds may put the best elsewhere than few: here two steps above."""
  ladder = np.array(pareto.RADII)
  coarse = lambda values: -np.abs(np.log(values / (peak / 1.25**2)))
  fine_values = []

  def fine(values):
    assert len(values) == 4
    fine_values.extend(values)
    return -np.abs(np.log(values / peak))

  found = pareto.choose(ladder, coarse(ladder), coarse, fine, widenings=3)
  assert found.best == pytest.approx(peak, rel=0.13)
  assert not found.is_at_the_end
  values, worth = found.fine
  assert values[0] < found.best < values[-1]
  assert worth[values.index(found.best)] == max(worth)
  assert set(values) == set(fine_values)


def test_a_best_beyond_all_widenings_is_said_to_be_at_the_end():
  ladder = np.array(pareto.RADII)
  found = pareto.choose(ladder, ladder, lambda x: x, lambda x: x, widenings=0)
  assert found.best == ladder[-1]
  assert found.is_at_the_end


def test_every_form_has_its_gradients_counted():
  """At most those of F-SAM, at least one; a late form the fraction more."""
  for name, arm in pareto.ARMS.items():
    assert 1 <= arm.gradients <= 2, name
    fraction = arm.options.get("ascent_fraction", 1)
    every = arm.options.get("every", 1)
    if arm.options.keys() & {"ascent_fraction", "every"}:
      assert arm.gradients == 1 + fraction / every, name

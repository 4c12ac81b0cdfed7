"""The ascent directions of the studies, against gradients by hand."""

from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax.experiments.studies import ascents


def loss_fn(params, model_state, batch, rng):
  del rng
  error = batch["x"] @ params["w"] - batch["y"]
  return jnp.mean(error**2), (model_state, {})


@pytest.fixture(name="batch", scope="module")
def fixture_batch():
  rng = np.random.default_rng(0)
  rows = lambda n: {
    "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=n), jnp.float32),
  }
  return {**rows(8), "whole": rows(40), "other": rows(8)}


def gradient(w, rows):
  """Of the loss above, by hand."""
  return 2 / len(rows["y"]) * rows["x"].T @ (rows["x"] @ w - rows["y"])


def state_with(perturbation):
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params={"w": jnp.array([0.5, -1.0, 2.0])},
    tx=optax.sgd(0.1),
    perturbation=perturbation,
  )


@pytest.mark.parametrize(
  ("direction", "expected"),
  [
    (ascents.full_gradient(), lambda w, b: gradient(w, b["whole"])),
    (
      ascents.gradient_noise(),
      lambda w, b: gradient(w, b) - gradient(w, b["whole"]),
    ),
    (ascents.other_gradient(), lambda w, b: gradient(w, b["other"])),
    (ascents.gradient_ema(0.9), gradient),  # The first gradient, at first.
  ],
)
def test_step_ascends_along_the_direction(batch, direction, expected):
  state = state_with(ascents.along(direction, 0.3))
  w = state.params["w"]
  along = expected(w, batch)
  perturbed = w + 0.3 * along / jnp.linalg.norm(along)
  new, metrics = ascents.step_on_other_rows(loss_fn)(state, batch)
  np.testing.assert_allclose(
    new.params["w"], w - 0.1 * gradient(perturbed, batch), rtol=1e-4
  )
  np.testing.assert_allclose(
    metrics["loss"], loss_fn(state.params, None, batch, None)[0], rtol=1e-6
  )


def test_average_alone_is_that_of_the_gradients_before():
  direction = ascents.gradient_ema(0.75)
  state = direction.init(jnp.zeros(2))
  first, second = jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0])
  found, state = direction.update(first, state)
  np.testing.assert_allclose(found, first)
  found, state = direction.update(second, state)
  np.testing.assert_allclose(found, first)
  found, state = direction.update(second, state)
  np.testing.assert_allclose(found, 0.75 * first + 0.25 * second)


def test_a_perturbation_is_held_until_the_next_and_sees_no_gradient_between():
  ascent = ascents.hold(fsam_optax.friendly_perturbation(1.0), 2)
  own = fsam_optax.friendly_perturbation(1.0)
  state, own_state = ascent.init(jnp.zeros(2)), own.init(jnp.zeros(2))
  for i in range(4):
    given = jnp.array([1.0, i])
    found, state = ascent.update(given, state)
    if i % 2 == 0:
      fresh, own_state = own.update(given, own_state)
    np.testing.assert_array_equal(found, fresh)


def test_random_directions_differ_by_run_and_step():
  direction = ascents.random_direction()
  drawn = []
  for params in (jnp.ones(50), jnp.full(50, 2.0)):
    state = direction.init(params)
    for _ in range(2):
      found, state = direction.update(jnp.zeros(50), state)
      drawn.append(np.asarray(found))
  cosines = np.corrcoef(drawn) - np.eye(4)
  assert np.all(np.abs(cosines) < 0.5)


@pytest.mark.parametrize(
  "perturbation",
  [
    fsam_optax.sam_perturbation(0.3),
    fsam_optax.friendly_perturbation(0.3),
  ],
)
def test_step_of_the_studies_is_that_of_the_library(batch, perturbation):
  own, library = state_with(perturbation), state_with(perturbation)
  step = ascents.step_on_other_rows(loss_fn)
  library_step = fsam_optax.make_train_step(loss_fn, jit=False)
  for _ in range(3):
    own, _ = step(own, batch)
    library, _ = library_step(library, {"x": batch["x"], "y": batch["y"]})
  np.testing.assert_allclose(own.params["w"], library.params["w"], rtol=1e-5)

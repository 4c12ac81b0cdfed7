"""The ascent directions of the studies, against gradients by hand."""

from faces import state_of
from jax import numpy as jnp
import numpy as np
import pytest

import fsam_optax
from fsam_optax.experiments.studies import ascents


def loss_fn(params, model_state, batch, rng):
  del rng
  error = batch["x"] @ params["w"] - batch["y"]
  return jnp.mean(error**2, where=batch.get("where")), (model_state, {})


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


PARAMS = {"w": jnp.array([0.5, -1.0, 2.0])}


@pytest.mark.parametrize(
  ("direction", "expected"),
  [
    (ascents.full_gradient(), lambda w, b: gradient(w, b["whole"])),
    # The average is 0 before the first step, and then the first gradient.
    (ascents.other_noise(0.9), lambda w, b: gradient(w, b["other"])),
    (ascents.gradient_ema(0.9), gradient),
  ],
)
def test_step_ascends_along_the_direction(batch, direction, expected):
  state = state_of(PARAMS, ascents.along(direction, 0.3))
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


def test_average_alone_has_the_batch_in_it_and_the_noise_of_others_has_not():
  given = [jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0]), jnp.array([3.0, 0.0])]
  others = [2 * g for g in given]
  average, noise = ascents.gradient_ema(0.75), ascents.other_noise(0.75)
  state, noise_state = (x.init(jnp.zeros(2)) for x in (average, noise))
  ema = jnp.zeros(2)
  for i, (own, other) in enumerate(zip(given, others, strict=True)):
    found, noise_state = noise.update(
      own, noise_state, gradient_on={"other": other}.get
    )
    np.testing.assert_allclose(found, other - ema)
    ema = own if i == 0 else 0.75 * ema + 0.25 * own
    found, state = average.update(own, state)
    np.testing.assert_allclose(found, ema)


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
  ("make_step", "options"),
  [
    (ascents.step_on_other_rows, {}),
    (
      ascents.step_by_all_statistics,
      {"ascent_fraction": 0.25, "ema_gradient": "descent"},
    ),
  ],
)
def test_steps_are_the_library_s_on_rows_normalized_together(
  batch, make_step, options
):
  """The library has rows that were normalized before, by all of the batch."""
  perturbation = fsam_optax.friendly_perturbation(0.3)
  own, library = (state_of(PARAMS, perturbation) for _ in range(2))
  normalized = lambda rows: {**rows, "x": rows["x"] - jnp.mean(rows["x"], 0)}
  step = make_step(
    lambda params, state, rows, rng: loss_fn(
      params, state, normalized(rows), rng
    ),
    **options,
  )
  library_step = fsam_optax.make_train_step(loss_fn, jit=False, **options)
  for _ in range(3):
    own, metrics = step(own, batch)
    library, library_metrics = library_step(
      library, normalized({"x": batch["x"], "y": batch["y"]})
    )
  np.testing.assert_allclose(own.params["w"], library.params["w"], rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], library_metrics["loss"], 1e-5)

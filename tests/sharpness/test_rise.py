"""The rises of the loss, against those of a quadratic."""

import math

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import quadratic

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")

RHO = 0.1


@pytest.mark.parametrize("batch_size", [None, 7])
def test_ascent_rises_as_the_quadratic_says(data, batch_size):
  data, _ = data
  w = np.arange(6.0)
  gradient = quadratic.hessian(data) @ w
  unit = gradient / np.linalg.norm(gradient)
  expected = RHO * np.linalg.norm(gradient)
  expected += RHO**2 / 2 * unit @ quadratic.hessian(data) @ unit
  rise = sharpness.ascent_sharpness(
    quadratic.loss, quadratic.tree(w), data, RHO, batch_size=batch_size
  )
  np.testing.assert_allclose(rise.mean, expected, rtol=1e-9)
  assert rise.values.shape == (1,)
  assert math.isnan(rise.standard_error)


def test_ascent_next_to_the_minimum_sees_the_eigenvalue_it_stands_on(data):
  # Wen, Ma and Li: along an eigenvector, half rho^2 times its eigenvalue.
  data, right = data
  for eigenvalue, vector in zip(quadratic.SPECTRUM, right, strict=True):
    rise = sharpness.ascent_sharpness(
      quadratic.loss, quadratic.tree(1e-7 * vector), data, RHO
    )
    np.testing.assert_allclose(rise.mean, RHO**2 / 2 * eigenvalue, rtol=2e-4)


def test_worst_direction_sees_the_largest_eigenvalue(data):
  data, _ = data
  worst = sharpness.worst_sharpness(
    quadratic.loss,
    quadratic.tree(np.zeros(6)),
    data,
    RHO,
    key=jax.random.key(0),
    steps=60,
  )
  np.testing.assert_allclose(
    worst.mean, RHO**2 / 2 * quadratic.SPECTRUM[0], rtol=1e-6
  )


def test_average_direction_sees_the_trace_over_the_dimension(data):
  data, _ = data
  average = sharpness.average_sharpness(
    quadratic.loss,
    quadratic.tree(np.zeros(6)),
    data,
    RHO,
    key=jax.random.key(0),
    samples=600,
  )
  expected = RHO**2 / 2 * quadratic.SPECTRUM.sum() / 6
  assert abs(average.mean - expected) < 4 * average.standard_error
  assert average.standard_error < 0.05 * expected


@pytest.mark.parametrize("batch_size", [None, 5, 1])
def test_single_rows_ascend_to_the_trace(data, batch_size):
  # Wen, Ma and Li: row by row, ascent and worst direction both see the trace.
  data, _ = data
  expected = RHO**2 / 2 * quadratic.SPECTRUM.sum()
  w = quadratic.tree(1e-7 * np.ones(6))
  ascent = sharpness.ascent_sharpness(
    quadratic.loss, w, data, RHO, rows=1, batch_size=batch_size
  )
  worst = sharpness.worst_sharpness(
    quadratic.loss,
    w,
    data,
    RHO,
    rows=1,
    batch_size=batch_size,
    key=jax.random.key(0),
    steps=40,
  )
  np.testing.assert_allclose(ascent.mean, expected, rtol=2e-4)
  np.testing.assert_allclose(worst.mean, expected, rtol=2e-4)
  assert ascent.values.shape == (24,)


def test_groups_of_rows_rise_each_along_its_own_gradient(data):
  data, _ = data
  w = quadratic.tree(np.arange(6.0))
  rise = sharpness.ascent_sharpness(quadratic.loss, w, data, RHO, rows=10)
  alone = [
    sharpness.ascent_sharpness(
      quadratic.loss, w, {"x": data["x"][i : i + 10]}, RHO
    ).mean
    for i in (0, 10)
  ]
  np.testing.assert_allclose(rise.values, alone, rtol=1e-9)
  # The four rows that fill no group count nowhere.
  loss = sharpness.mean_loss(quadratic.loss, w, {"x": data["x"][:20]})
  np.testing.assert_allclose(rise.loss, loss, rtol=1e-9)


def test_average_over_groups_sees_the_trace_too(data):
  data, _ = data
  average = sharpness.average_sharpness(
    quadratic.loss,
    quadratic.tree(np.zeros(6)),
    data,
    RHO,
    key=jax.random.key(1),
    samples=300,
    rows=6,
  )
  expected = RHO**2 / 2 * quadratic.SPECTRUM.sum() / 6
  np.testing.assert_allclose(average.mean, expected, rtol=0.1)


def test_adaptive_ascent_moves_each_weight_by_its_size(data):
  data, _ = data
  w = np.arange(6.0)
  gradient = quadratic.hessian(data) @ w
  epsilon = RHO * w**2 * gradient / np.linalg.norm(w * gradient)
  moved = w + epsilon
  expected = (
    moved @ quadratic.hessian(data) @ moved / 2
    - w @ quadratic.hessian(data) @ w / 2
  )
  rise = sharpness.ascent_sharpness(
    quadratic.loss, quadratic.tree(w), data, RHO, adaptive=True
  )
  np.testing.assert_allclose(rise.mean, expected, rtol=1e-9)


def test_worst_is_never_below_the_ascent():
  loss_fn = lambda w, batch: jnp.mean(jnp.cos(batch @ w) + 0.1 * (w @ w))
  rng = np.random.default_rng(1)
  batch, w = rng.normal(size=(30, 5)), jnp.asarray(rng.normal(size=5))
  for rho in (0.01, 0.3, 2.0):
    for rows in (None, 5):
      ascent = sharpness.ascent_sharpness(loss_fn, w, batch, rho, rows=rows)
      worst = sharpness.worst_sharpness(
        loss_fn, w, batch, rho, key=jax.random.key(0), steps=3, rows=rows
      )
      assert np.all(worst.values >= ascent.values)


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("name", ["ascent", "worst", "average"])
def test_second_call_compiles_nothing(data, name, rows):
  traces = []

  def loss_fn(params, batch):
    traces.append(name)
    return quadratic.loss(params, batch)

  measure = getattr(sharpness, f"{name}_sharpness")
  options = {} if name == "ascent" else {"key": jax.random.key(0)}
  measure(
    loss_fn, quadratic.tree(np.ones(6)), data[0], 0.1, rows=rows, **options
  )
  first = len(traces)
  assert first
  measure(
    loss_fn, quadratic.tree(np.zeros(6)), data[0], 0.2, rows=rows, **options
  )
  assert len(traces) == first


def test_zero_gradient_does_not_rise(data):
  data, _ = data
  rise = sharpness.ascent_sharpness(
    quadratic.loss, quadratic.tree(np.zeros(6)), data, RHO
  )
  assert rise.mean == 0


def test_progress_bar_changes_nothing(data, capsys):
  data, _ = data
  w = quadratic.tree(np.ones(6))
  shown = sharpness.average_sharpness(
    quadratic.loss,
    w,
    data,
    RHO,
    key=jax.random.key(0),
    samples=3,
    batch_size=7,
    progress=True,
  )
  assert "average" in capsys.readouterr().out
  hidden = sharpness.average_sharpness(
    quadratic.loss,
    w,
    data,
    RHO,
    key=jax.random.key(0),
    samples=3,
    batch_size=7,
  )
  np.testing.assert_array_equal(shown.values, hidden.values)
  assert "average" not in capsys.readouterr().out


@pytest.mark.parametrize(
  ("change", "error", "match"),
  [
    ({"rho": 0.0}, ValueError, "`rho` must be positive, got 0"),
    ({"rho": -1.0}, ValueError, "`rho` must be non-negative"),
    ({"rho": math.inf}, ValueError, "`rho` must be finite"),
    ({"rho": 1e200}, ValueError, "`rho` must leave the loss finite"),
    ({"rows": 25}, ValueError, "`rows` must be at most .* 24, got 25"),
    ({"batch_size": 25}, ValueError, "`batch_size` must be at most"),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    ({"batch_size": 2.0}, TypeError, "`batch_size` must be an int"),
    ({"data": {"x": np.zeros((0, 6))}}, ValueError, "`data` must hold"),
    ({"data": {"x": np.full((4, 6), np.nan)}}, ValueError, "finite loss"),
    (
      {"loss_fn": lambda params, batch: batch["x"] @ jnp.ones(6)},
      TypeError,
      "`loss_fn` must return the loss as a real scalar",
    ),
  ],
)
@pytest.mark.parametrize("measure", ["ascent", "worst", "average"])
def test_bad_input_names_the_argument(data, measure, change, error, match):
  arguments = {
    "loss_fn": quadratic.loss,
    "params": quadratic.tree(np.ones(6)),
    "data": data[0],
    "rho": RHO,
    **change,
  }
  if measure != "ascent":
    arguments["key"] = jax.random.key(0)
  with pytest.raises(error, match=match):
    getattr(sharpness, f"{measure}_sharpness")(**arguments)

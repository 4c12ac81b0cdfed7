"""The measures, against losses whose answers are known."""

import math
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")

SPECTRUM = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.25])
RHO = 0.1


def quadratic(params, batch):
  """Half the mean square of the rows' products: the Hessian is their Gram."""
  w = jnp.concatenate([params["a"], params["b"]])
  return 0.5 * jnp.mean((batch["x"] @ w) ** 2)


@pytest.fixture(name="data", scope="module")
def fixture_data():
  """24 rows whose mean outer product has the known spectrum."""
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(24, 6)))
  right, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  x = left * np.sqrt(24 * SPECTRUM) @ right
  return {"x": x}, right


def tree(vector):
  """The vector as a tree of two leaves."""
  return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:])}


def hessian(data):
  """The Hessian of the quadratic, by NumPy."""
  return data["x"].T @ data["x"] / 24


@pytest.mark.parametrize("batch_size", [None, 24, 8, 7])
def test_gradient_over_the_data_is_that_of_all_rows(data, batch_size):
  data, _ = data
  w = np.arange(6.0)
  loss, gradient = sharpness.full_gradient(
    quadratic, tree(w), data, batch_size=batch_size
  )
  found = np.concatenate([gradient["a"], gradient["b"]])
  np.testing.assert_allclose(found, hessian(data) @ w, rtol=1e-10)
  np.testing.assert_allclose(loss, w @ hessian(data) @ w / 2, rtol=1e-10)
  mean = sharpness.mean_loss(quadratic, tree(w), data, batch_size=batch_size)
  np.testing.assert_allclose(mean, loss, rtol=1e-10)


@pytest.mark.parametrize("batch_size", [None, 7])
def test_ascent_rises_as_the_quadratic_says(data, batch_size):
  data, _ = data
  w = np.arange(6.0)
  gradient = hessian(data) @ w
  unit = gradient / np.linalg.norm(gradient)
  expected = RHO * np.linalg.norm(gradient)
  expected += RHO**2 / 2 * unit @ hessian(data) @ unit
  rise = sharpness.ascent_sharpness(
    quadratic, tree(w), data, RHO, batch_size=batch_size
  )
  np.testing.assert_allclose(rise.mean, expected, rtol=1e-9)
  assert rise.values.shape == (1,)
  assert math.isnan(rise.standard_error)


def test_ascent_next_to_the_minimum_sees_the_eigenvalue_it_stands_on(data):
  # Wen, Ma and Li: along an eigenvector, half rho^2 times its eigenvalue.
  data, right = data
  for eigenvalue, vector in zip(SPECTRUM, right, strict=True):
    rise = sharpness.ascent_sharpness(quadratic, tree(1e-7 * vector), data, RHO)
    np.testing.assert_allclose(rise.mean, RHO**2 / 2 * eigenvalue, rtol=2e-4)


def test_worst_direction_sees_the_largest_eigenvalue(data):
  data, _ = data
  worst = sharpness.worst_sharpness(
    quadratic, tree(np.zeros(6)), data, RHO, key=jax.random.key(0), steps=60
  )
  np.testing.assert_allclose(worst.mean, RHO**2 / 2 * SPECTRUM[0], rtol=1e-6)


def test_average_direction_sees_the_trace_over_the_dimension(data):
  data, _ = data
  average = sharpness.average_sharpness(
    quadratic,
    tree(np.zeros(6)),
    data,
    RHO,
    key=jax.random.key(0),
    samples=600,
  )
  expected = RHO**2 / 2 * SPECTRUM.sum() / 6
  assert abs(average.mean - expected) < 4 * average.standard_error
  assert average.standard_error < 0.05 * expected


@pytest.mark.parametrize("batch_size", [None, 5, 1])
def test_single_rows_ascend_to_the_trace(data, batch_size):
  # Wen, Ma and Li: row by row, ascent and worst direction both see the trace.
  data, _ = data
  expected = RHO**2 / 2 * SPECTRUM.sum()
  w = tree(1e-7 * np.ones(6))
  ascent = sharpness.ascent_sharpness(
    quadratic, w, data, RHO, rows=1, batch_size=batch_size
  )
  worst = sharpness.worst_sharpness(
    quadratic,
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
  w = tree(np.arange(6.0))
  rise = sharpness.ascent_sharpness(quadratic, w, data, RHO, rows=10)
  alone = [
    sharpness.ascent_sharpness(
      quadratic, w, {"x": data["x"][i : i + 10]}, RHO
    ).mean
    for i in (0, 10)
  ]
  np.testing.assert_allclose(rise.values, alone, rtol=1e-9)
  # The four rows that fill no group count nowhere.
  loss = sharpness.mean_loss(quadratic, w, {"x": data["x"][:20]})
  np.testing.assert_allclose(rise.loss, loss, rtol=1e-9)


def test_average_over_groups_sees_the_trace_too(data):
  data, _ = data
  average = sharpness.average_sharpness(
    quadratic,
    tree(np.zeros(6)),
    data,
    RHO,
    key=jax.random.key(1),
    samples=300,
    rows=6,
  )
  expected = RHO**2 / 2 * SPECTRUM.sum() / 6
  np.testing.assert_allclose(average.mean, expected, rtol=0.1)


def test_adaptive_ascent_moves_each_weight_by_its_size(data):
  data, _ = data
  w = np.arange(6.0)
  gradient = hessian(data) @ w
  epsilon = RHO * w**2 * gradient / np.linalg.norm(w * gradient)
  moved = w + epsilon
  expected = moved @ hessian(data) @ moved / 2 - w @ hessian(data) @ w / 2
  rise = sharpness.ascent_sharpness(
    quadratic, tree(w), data, RHO, adaptive=True
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


@pytest.mark.parametrize("batch_size", [None, 7])
def test_eigenvalues_are_the_known_ones(data, batch_size):
  data, _ = data
  values = sharpness.hessian_eigenvalues(
    quadratic,
    tree(np.ones(6)),
    data,
    6,
    key=jax.random.key(0),
    batch_size=batch_size,
  )
  np.testing.assert_allclose(values, SPECTRUM, rtol=1e-8)


def test_trace_is_the_known_one_within_its_error(data):
  data, _ = data
  mean, error = sharpness.hessian_trace(
    quadratic, tree(np.ones(6)), data, key=jax.random.key(0), samples=400
  )
  assert abs(mean - SPECTRUM.sum()) < 4 * error
  assert error < 0.05 * SPECTRUM.sum()


def test_density_has_the_trace_and_integrates_to_one(data):
  data, _ = data
  density = sharpness.hessian_density(
    quadratic,
    tree(np.ones(6)),
    data,
    key=jax.random.key(0),
    num_matvecs=6,
    samples=300,
  )
  np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-9)
  mean = np.mean(np.sum(density.nodes * density.weights, axis=1))
  np.testing.assert_allclose(mean, SPECTRUM.mean(), rtol=0.05)
  grid = np.linspace(-3, 8, 2000)
  smooth = density.at(grid, width=0.2)
  np.testing.assert_allclose(np.trapezoid(smooth, grid), 1, rtol=1e-6)
  with pytest.raises(ValueError, match="`width` must be positive"):
    density.at(grid, width=0.0)


def test_noise_of_batches_is_against_the_full_gradient(data):
  data, _ = data
  w = np.arange(6.0)
  ema = np.linspace(1, 2, 6)
  full = hessian(data) @ w
  noise = sharpness.gradient_noise(
    quadratic, tree(w), data, rows=9, ema=tree(ema), sigma=0.5
  )
  cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  gradients = [
    data["x"][i : i + 9].T @ data["x"][i : i + 9] @ w / 9 for i in (0, 9)
  ]
  assert noise.batch_norm.shape == (2,)
  np.testing.assert_allclose(noise.full_norm, np.linalg.norm(full), rtol=1e-9)
  for i, gradient in enumerate(gradients):
    for found, expected in (
      (noise.batch_norm, np.linalg.norm(gradient)),
      (noise.noise_norm, np.linalg.norm(gradient - full)),
      (noise.batch_cosine, cosine(gradient, full)),
      (noise.noise_cosine, cosine(gradient - full, full)),
      (noise.direction_cosine, cosine(gradient - 0.5 * ema, full)),
    ):
      np.testing.assert_allclose(found[i], expected, rtol=1e-8)
  np.testing.assert_allclose(noise.ema_cosine, cosine(ema, full), rtol=1e-9)
  error = np.linalg.norm(ema - full) / np.linalg.norm(full)
  np.testing.assert_allclose(noise.ema_error, error, rtol=1e-9)
  without = sharpness.gradient_noise(quadratic, tree(w), data, rows=9)
  assert math.isnan(without.ema_error)
  assert np.all(np.isnan(without.direction_cosine))


def test_loss_on_a_plane_is_the_loss_there(data):
  data, _ = data
  rng = np.random.default_rng(2)
  w, u, v = rng.normal(size=(3, 6))
  x, y = [-1.0, 0.0, 2.0], [0.0, 0.5]
  plane = sharpness.loss_on_plane(
    quadratic, tree(w), (tree(u), tree(v)), data, x, y, batch_size=5
  )
  assert plane.shape == (2, 3)
  for j, b in enumerate(y):
    for i, a in enumerate(x):
      at = w + a * u + b * v
      np.testing.assert_allclose(
        plane[j, i], at @ hessian(data) @ at / 2, rtol=1e-9
      )
  line = sharpness.loss_along_line(quadratic, tree(w), tree(u), data, x)
  np.testing.assert_allclose(line, plane[0], rtol=1e-9)


def test_filters_of_a_direction_are_as_long_as_those_of_the_weights():
  params = {
    "kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 5))),
    "bias": jnp.ones(5),
  }
  direction = sharpness.filter_normalized_direction(jax.random.key(0), params)
  norms = lambda x: np.sqrt(np.sum(np.square(x), axis=(0, 1, 2)))
  np.testing.assert_allclose(
    norms(direction["kernel"]), norms(params["kernel"]), rtol=1e-9
  )
  assert np.all(direction["bias"] == 0)
  other = sharpness.filter_normalized_direction(jax.random.key(1), params)
  assert not np.allclose(direction["kernel"], other["kernel"])


@pytest.mark.parametrize("rows", [None, 6])
@pytest.mark.parametrize("name", ["ascent", "worst", "average"])
def test_second_call_compiles_nothing(data, name, rows):
  traces = []

  def loss_fn(params, batch):
    traces.append(name)
    return quadratic(params, batch)

  measure = getattr(sharpness, f"{name}_sharpness")
  options = {} if name == "ascent" else {"key": jax.random.key(0)}
  measure(loss_fn, tree(np.ones(6)), data[0], 0.1, rows=rows, **options)
  first = len(traces)
  assert first
  measure(loss_fn, tree(np.zeros(6)), data[0], 0.2, rows=rows, **options)
  assert len(traces) == first


def test_zero_gradient_does_not_rise(data):
  data, _ = data
  rise = sharpness.ascent_sharpness(quadratic, tree(np.zeros(6)), data, RHO)
  assert rise.mean == 0


def test_progress_bar_changes_nothing(data, capsys):
  data, _ = data
  w = tree(np.ones(6))
  shown = sharpness.average_sharpness(
    quadratic,
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
    quadratic,
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
    "loss_fn": quadratic,
    "params": tree(np.ones(6)),
    "data": data[0],
    "rho": RHO,
    **change,
  }
  if measure != "ascent":
    arguments["key"] = jax.random.key(0)
  with pytest.raises(error, match=match):
    getattr(sharpness, f"{measure}_sharpness")(**arguments)


@pytest.mark.parametrize(
  ("name", "change", "error", "match"),
  [
    ("hessian_eigenvalues", {"num": 7}, ValueError, "`num` must be at most"),
    ("hessian_eigenvalues", {"num": 0}, ValueError, "`num` must be at least 1"),
    (
      "hessian_eigenvalues",
      {"num": 3, "num_matvecs": 2},
      ValueError,
      "`num_matvecs` must be at least `num`",
    ),
    ("hessian_density", {"num_matvecs": 7}, ValueError, "number of parameters"),
    ("hessian_trace", {"samples": 1}, ValueError, "`samples` must be at least"),
    (
      "hessian_trace",
      {"data": {"x": np.full((4, 6), np.inf)}},
      ValueError,
      "`params` must have a finite Hessian",
    ),
  ],
)
def test_bad_curvature_names_the_argument(data, name, change, error, match):
  arguments = {"params": tree(np.ones(6)), "data": data[0], **change}
  if name == "hessian_density":
    arguments.setdefault("num_matvecs", 3)
  with pytest.raises(error, match=match):
    getattr(sharpness, name)(quadratic, key=jax.random.key(0), **arguments)


@pytest.mark.parametrize(
  "name", ["hessian_eigenvalues", "hessian_trace", "hessian_density"]
)
def test_hessian_refuses_half_precision(data, name):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(np.ones(6)))
  with pytest.raises(TypeError, match=r"float32 or float64 .* bfloat16 at"):
    getattr(sharpness, name)(quadratic, half, data[0], key=jax.random.key(0))


def test_noise_refuses_an_average_of_another_tree(data):
  with pytest.raises(ValueError, match="`ema` must have the structure"):
    sharpness.gradient_noise(
      quadratic, tree(np.ones(6)), data[0], rows=4, ema={"a": jnp.ones(2)}
    )


def test_missing_package_is_named_with_its_remedy(data, monkeypatch):
  monkeypatch.setitem(sys.modules, "matfree", None)
  with pytest.raises(ImportError, match=r"pip install 'fsam-optax\[sharpness"):
    sharpness.hessian_trace(
      quadratic, tree(np.ones(6)), data[0], key=jax.random.key(0)
    )

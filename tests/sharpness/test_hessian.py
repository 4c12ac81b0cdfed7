"""The Hessian's spectrum, against the one that is known."""

import sys

import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import pytest
import quadratic
from versions import set_mesh

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")


def measure(name, *args, data=quadratic.DATA, **options):
  """One of the measures at weights of ones."""
  return getattr(sharpness, f"hessian_{name}")(
    quadratic.loss,
    options.pop("params", quadratic.tree(np.ones(6))),
    data,
    *args,
    key=jax.random.key(0),
    **options,
  )


def test_eigenvalues_are_the_known_ones():
  values = measure("eigenvalues", 6, batch_size=7)
  np.testing.assert_allclose(values, quadratic.SPECTRUM, rtol=1e-8)


def test_trace_is_the_known_one_within_its_error():
  mean, error = measure("trace", samples=400)
  assert abs(mean - quadratic.SPECTRUM.sum()) < 4 * error
  assert error < 0.05 * quadratic.SPECTRUM.sum()


def test_density_has_the_trace_and_integrates_to_one():
  density = measure("density", num_matvecs=6, samples=300)
  np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-9)
  mean = np.mean(np.sum(density.nodes * density.weights, axis=1))
  np.testing.assert_allclose(mean, quadratic.SPECTRUM.mean(), rtol=0.05)
  grid = np.linspace(-3, 8, 2000)
  smooth = density.at(grid, width=0.2)
  np.testing.assert_allclose(np.trapezoid(smooth, grid), 1, rtol=1e-6)
  with pytest.raises(ValueError, match="`width` must be positive"):
    density.at(grid, width=0.0)


@pytest.mark.parametrize(
  ("name", "change", "match"),
  [
    ("eigenvalues", {"num": 7}, "`num` must be at most the number of parame"),
    ("eigenvalues", {"num": 0}, "`num` must be at least 1"),
    ("eigenvalues", {"num": 3, "num_matvecs": 2}, "must be at least `num`"),
    ("density", {"num_matvecs": 7}, "`num_matvecs` must be at most"),
    ("trace", {"samples": 1}, "`samples` must be at least"),
    ("trace", {"data": {"x": np.full((4, 6), np.inf)}}, "a finite Hessian"),
    ("eigenvalues", {"data": {"x": np.full((4, 6), np.inf)}}, "finite Hess"),
  ],
)
def test_bad_curvature_names_the_argument(name, change, match):
  with pytest.raises(ValueError, match=match):
    measure(name, **change)


@pytest.mark.parametrize("name", ["eigenvalues", "trace", "density"])
def test_hessian_refuses_half_precision(name):
  params = quadratic.tree(np.ones(6))
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  with pytest.raises(TypeError, match=r"float32 or float64 .* bfloat16 at"):
    measure(name, params=half)


def test_missing_package_is_named_with_its_remedy(monkeypatch):
  monkeypatch.setitem(sys.modules, "matfree", None)
  with pytest.raises(ImportError, match=r'pip install "matfree>=0\.6"'):
    measure("trace")


def test_a_loss_without_curvature_has_a_hessian_of_zero():
  """Not one that diverged."""
  flat = lambda w, batch: jnp.mean(batch) * jnp.sum(w)
  params, key = jnp.ones(4), jax.random.key(0)
  rows = jnp.ones((6, 2))
  values = sharpness.hessian_eigenvalues(flat, params, rows, 3, key=key)
  np.testing.assert_array_equal(values, np.zeros(3))
  assert sharpness.hessian_trace(flat, params, rows, key=key) == (0.0, 0.0)
  found = sharpness.hessian_density(
    flat, params, rows, key=key, num_matvecs=3, samples=2
  )
  np.testing.assert_array_equal(found.nodes, np.zeros((2, 3)))
  np.testing.assert_array_equal(found.weights, [[1, 0, 0]] * 2)


def few_rows(number):
  """A model of 100 parameters, and the Hessian's eigenvalues."""
  x = np.random.default_rng(number).normal(size=(number, 100))
  loss = lambda w, batch: jnp.mean((batch @ w - 1) ** 2)
  values = np.linalg.eigvalsh(2 / number * x.T @ x)[::-1]
  return (loss, jnp.zeros(100, jnp.float32), jnp.float32(x)), values


@pytest.mark.parametrize("number", [1, 5, 10, 40])
def test_a_hessian_of_low_rank_has_its_own_eigenvalues(number):
  """Lanczos would go on with rounding, and find what is not there."""
  args, expected = few_rows(number)
  num = min(number, 3)
  for seed in range(3):
    values = sharpness.hessian_eigenvalues(*args, num, key=jax.random.key(seed))
    np.testing.assert_allclose(values, expected[:num], rtol=1e-3)
  density = sharpness.hessian_density(*args, key=jax.random.key(0), samples=50)
  np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-6)
  assert density.nodes.max() < expected[0] * (1 + 1e-4)
  assert density.nodes.min() > -1e-4 * expected[0]
  traces = 100 * np.sum(density.nodes * density.weights, axis=1)
  assert abs(traces.mean() - expected.sum()) < 4 * traces.std() / 50**0.5


def test_more_eigenvalues_than_differ_are_refused():
  args, _ = few_rows(5)
  with pytest.raises(ValueError, match=r"`num` must be at most \d, the num"):
    sharpness.hessian_eigenvalues(*args, 20, key=jax.random.key(0))


@pytest.mark.parametrize("number", [1, 3, 5, 10, 10_000])
def test_a_multiple_of_the_identity_has_one_eigenvalue(number):
  loss = lambda w, batch: jnp.mean(batch) * jnp.sum(w**2)
  args = (loss, jnp.ones(number, jnp.float32), jnp.ones((4, 1)))
  for seed, num in enumerate([1, min(number, 2)] * 10):
    values = sharpness.hessian_eigenvalues(*args, num, key=jax.random.key(seed))
    np.testing.assert_allclose(values, [2.0] * num, rtol=1e-4)


def test_small_eigenvalues_of_many_parameters_are_seen_beside_a_large_one():
  spectrum = np.random.default_rng(0).uniform(0, 1e-5, 10_000)
  spectrum[:2] = 1, 3e-5
  spectrum = jnp.float32(spectrum)
  loss = lambda w, batch: 0.5 * jnp.mean(batch) * jnp.sum(spectrum * w**2)
  values = sharpness.hessian_eigenvalues(
    *(loss, jnp.ones(10_000), jnp.ones((2, 1)), 2), key=jax.random.key(0)
  )
  np.testing.assert_allclose(values, [1, 3e-5], rtol=1e-2)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_eigenvalues_far_from_one_are_no_less_exact(scale):
  loss = lambda w, batch: jnp.mean(batch @ w**2) * scale
  values = sharpness.hessian_eigenvalues(
    *(loss, jnp.ones(3, jnp.float32), jnp.array([[0.5, 1.0, 1.5]]), 3),
    key=jax.random.key(0),
  )
  np.testing.assert_allclose(values / scale, [3, 2, 1], rtol=1e-4)


def test_the_trace_of_parameters_along_an_explicit_axis():
  mesh = make_mesh("Explicit", model=2)
  rows = jax.NamedSharding(mesh, jax.P("model"))
  params = jax.device_put(quadratic.tree(np.ones(6)), rows)
  options = {"samples": 4, "batch_size": 7}
  with set_mesh(mesh):
    found = measure("trace", params=params, **options)
  np.testing.assert_allclose(found, measure("trace", **options), rtol=1e-9)

"""The rises of the loss, against those of a quadratic."""

import math
import sys

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
import quadratic

import fsam_optax
from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")

RHO = 0.1
WEIGHTS = np.arange(6.0)
MEASURES = ["ascent", "worst", "average"]


def rise(measure, weights, *, data=quadratic.DATA, rho=RHO, **options):
  loss_fn = options.pop("loss_fn", quadratic.loss)
  if measure != "ascent":
    options["key"] = jax.random.key(0)
  fn = getattr(sharpness, f"{measure}_sharpness")
  return fn(loss_fn, quadratic.tree(weights), data, rho, **options)


@pytest.mark.parametrize(("batch_size", "adaptive"), [(None, True), (7, False)])
def test_ascent_rises_as_the_quadratic_says(batch_size, adaptive):
  """Adaptive, it moves each weight by its size."""
  hessian = quadratic.HESSIAN
  gradient = hessian @ WEIGHTS
  size = WEIGHTS if adaptive else 1.0
  epsilon = RHO * size**2 * gradient / np.linalg.norm(size * gradient)
  found = rise("ascent", WEIGHTS, batch_size=batch_size, adaptive=adaptive)
  moved = WEIGHTS + epsilon
  expected = (moved @ hessian @ moved - WEIGHTS @ hessian @ WEIGHTS) / 2
  np.testing.assert_allclose(found.mean, expected, rtol=1e-9)
  assert found.values.shape == (1,)
  assert math.isnan(found.standard_error)


def test_ascent_next_to_the_minimum_sees_the_eigenvalue_it_stands_on():
  # Wen, Ma and Li: along an eigenvector, half rho^2 times its eigenvalue.
  for eigenvalue, vector in zip(
    quadratic.SPECTRUM, quadratic.RIGHT, strict=True
  ):
    found = rise("ascent", 1e-7 * vector).mean
    np.testing.assert_allclose(found, RHO**2 / 2 * eigenvalue, rtol=2e-4)
  assert rise("ascent", np.zeros(6)).mean == 0


def test_worst_direction_sees_the_largest_eigenvalue():
  worst = rise("worst", np.zeros(6), steps=60)
  expected = RHO**2 / 2 * quadratic.SPECTRUM[0]
  np.testing.assert_allclose(worst.mean, expected, rtol=1e-6)


@pytest.mark.parametrize("rows", [None, 6])
def test_average_direction_sees_the_trace_over_the_dimension(rows):
  average = rise("average", np.zeros(6), samples=600, rows=rows)
  expected = RHO**2 / 2 * quadratic.SPECTRUM.sum() / 6
  np.testing.assert_allclose(average.mean, expected, rtol=0.1)
  if rows is None:
    assert abs(average.mean - expected) < 4 * average.standard_error
    assert average.standard_error < 0.05 * expected


@pytest.mark.parametrize(("name", "dimensions"), [("real", 4), ("complex", 8)])
def test_a_complex_number_is_two_dimensions(name, dimensions):
  params = {"real": jnp.zeros(4), "complex": jnp.zeros(4, jnp.complex64)}
  loss = lambda p, batch: jnp.mean(batch) * jnp.sum(jnp.abs(p[name]) ** 2)
  found = sharpness.average_sharpness(
    loss, params, np.ones((1, 1)), 1.0, key=jax.random.key(0), samples=300
  )
  assert abs(found.mean - dimensions / 12) < 4 * found.standard_error
  assert found.standard_error < 0.015


@pytest.mark.parametrize("batch_size", [None, 5])
def test_single_rows_ascend_to_the_trace(batch_size):
  # Wen, Ma and Li: row by row, ascent and worst direction both see the trace.
  options = {"rows": 1, "batch_size": batch_size}
  ascent = rise("ascent", 1e-7 * np.ones(6), **options)
  worst = rise("worst", 1e-7 * np.ones(6), steps=40, **options)
  expected = RHO**2 / 2 * quadratic.SPECTRUM.sum()
  np.testing.assert_allclose([ascent.mean, worst.mean], expected, rtol=2e-4)
  assert ascent.values.shape == (24,)


def test_groups_of_rows_rise_each_along_its_own_gradient():
  x = quadratic.DATA["x"]
  found = rise("ascent", WEIGHTS, rows=10)
  alone = [
    rise("ascent", WEIGHTS, data={"x": x[i : i + 10]}).mean for i in (0, 10)
  ]
  np.testing.assert_allclose(found.values, alone, rtol=1e-9)
  # The four rows that fill no group count nowhere.
  loss = sharpness.mean_loss(
    quadratic.loss, quadratic.tree(WEIGHTS), {"x": x[:20]}
  )
  np.testing.assert_allclose(found.loss, loss, rtol=1e-9)


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


@pytest.mark.parametrize(
  ("measure", "rows"), [("ascent", 6), ("worst", None), ("average", 6)]
)
def test_second_call_compiles_nothing(measure, rows):
  traces = []
  loss_fn = lambda *args: (traces.append(None), quadratic.loss(*args))[1]
  rise(measure, np.ones(6), rho=0.1, loss_fn=loss_fn, rows=rows)
  first = len(traces)
  assert first
  rise(measure, np.zeros(6), rho=0.2, loss_fn=loss_fn, rows=rows)
  assert len(traces) == first


def test_progress_bar_changes_nothing(capsys):
  options = {"samples": 3, "batch_size": 7}
  shown = rise("average", np.ones(6), progress=True, **options)
  assert "average" in capsys.readouterr().out
  hidden = rise("average", np.ones(6), **options)
  np.testing.assert_array_equal(shown.values, hidden.values)
  assert "average" not in capsys.readouterr().out


def test_a_bar_without_its_package_is_an_error_with_the_remedy(monkeypatch):
  monkeypatch.setitem(sys.modules, "rich", None)
  with pytest.raises(ImportError, match=r"needs rich\. Run: pip install rich"):
    rise("average", np.ones(6), progress=True, samples=1)


@pytest.mark.parametrize(
  ("change", "error", "match"),
  [
    ({"rho": 0.0}, ValueError, "`rho` must be positive, got 0"),
    ({"rho": -1.0}, ValueError, "`rho` must be non-negative"),
    ({"rho": math.inf}, ValueError, "`rho` must be finite"),
    ({"rho": 1e200}, ValueError, "`rho` must leave the loss finite"),
    ({"rows": 25}, ValueError, "`rows` must be at most .* 24, got 25"),
    ({"steps": 0}, ValueError, "`steps` must be at least 1"),
    ({"restarts": 0}, ValueError, "`restarts` must be at least 1"),
    ({"batch_size": 25}, ValueError, "`batch_size` must be at most"),
    ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
    ({"batch_size": 2.0}, TypeError, "`batch_size` must be an int"),
    ({"data": {"x": np.zeros((0, 6))}}, ValueError, "`data` must hold"),
    ({"data": {"x": np.full((4, 6), np.nan)}}, ValueError, "finite loss"),
    ({"loss_fn": lambda *_: jnp.ones(2)}, TypeError, "`loss_fn` must return"),
  ],
)
def test_bad_input_names_the_argument(change, error, match):
  """In every measure, of what each checks by itself."""
  by_itself = change.keys() & {"rho", "data", "loss_fn"}
  for measure in MEASURES if by_itself else ["worst"]:
    with pytest.raises(error, match=match):
      rise(measure, np.ones(6), **change)


def test_what_flax_overwrites_does_not_move():
  """The Hessian of the weights is the identity: they rise by rho^2 / 2."""

  @jax.custom_vjp
  def scaled(x, scale):
    del scale
    return x

  # As of fp8: the gradient of a scale is its next value.
  scaled.defvjp(lambda *x: (x[0], x[1]), lambda s, g: (g, jnp.full_like(s, 9)))
  name = "_overwrite_with_gradient"
  loss_fn = lambda p, x: jnp.mean((x @ scaled(p["w"], p[name])) ** 2) / 2
  model = {"w": jnp.zeros(3), name: jnp.ones(5)}, 3**0.5 * jnp.eye(3), RHO
  for measure in (sharpness.average_sharpness, sharpness.worst_sharpness):
    found = measure(loss_fn, *model, key=jax.random.key(0)).mean
    np.testing.assert_allclose(found, RHO**2 / 2, rtol=1e-5)


def test_complex_parameters_ascend_as_in_a_train_step():
  """Along the conjugate of what `jax.grad` returns."""
  draw = np.random.default_rng(0).normal
  data, w = (draw(size=(*n, 2)) @ [1, 1j] for n in ((6, 3), (3,)))
  loss_fn = lambda w, batch: jnp.mean(jnp.abs(batch @ w - (1 + 1j)) ** 2)
  perturbation = fsam_optax.friendly_perturbation(RHO)
  passes = fsam_optax.value_and_grad(loss_fn, perturbation)
  value, _, state, info = passes(jnp.asarray(w), perturbation.init(w), data)
  measured = loss_fn, jnp.asarray(w), data
  found = sharpness.ascent_sharpness(*measured, RHO)
  # The first direction of F-SAM is that of SAM.
  np.testing.assert_allclose(found.mean, info.perturbed_value - value)
  residual = data @ w - (1 + 1j)
  gradient = 2 * data.conj().T @ residual / len(data)
  moved = data @ (w + RHO * gradient / np.linalg.norm(gradient)) - (1 + 1j)
  expected = np.mean(np.abs(moved) ** 2) - np.mean(np.abs(residual) ** 2)
  np.testing.assert_allclose(found.mean, expected)
  key = jax.random.key(0)
  # On the sphere nothing rises more than its norm and its curvature allow.
  worst = sharpness.worst_sharpness(*measured, RHO, key=key, steps=40).mean
  curvature = np.linalg.norm(data, 2) ** 2 / len(data)
  bound = RHO * np.linalg.norm(gradient) + RHO**2 * curvature
  assert expected <= worst <= bound
  ema = optax.tree.get(state, "ema")
  noise = sharpness.gradient_noise(*measured, rows=2, ema=ema)
  np.testing.assert_allclose(noise.ema_cosine, 1.0)
  assert noise.ema_error < 1e-12
  filters = draw(size=(3, 2, 2)) @ [1, 1j]
  direction = sharpness.filter_normalized_direction(key, jnp.asarray(filters))
  norms = [np.linalg.norm(x, axis=0) for x in (direction, filters)]
  np.testing.assert_allclose(*norms)

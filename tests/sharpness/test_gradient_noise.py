"""The noise of batches, against NumPy."""

import math

from jax import numpy as jnp
import numpy as np
import pytest
import quadratic

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")


def noise_at(w, **options):
  return sharpness.gradient_noise(
    quadratic.loss, quadratic.tree(w), quadratic.DATA, **options
  )


def test_noise_of_batches_is_against_the_full_gradient():
  w = np.arange(6.0)
  ema = np.linspace(1, 2, 6)
  full = quadratic.HESSIAN @ w
  noise = noise_at(w, rows=9, ema=quadratic.tree(ema), sigma=0.5)
  cosine = lambda a, b: a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  gradients = [x.T @ x @ w / 9 for x in np.split(quadratic.DATA["x"][:18], 2)]
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
  without = noise_at(w, rows=9)
  assert math.isnan(without.ema_error)
  assert np.all(np.isnan(without.direction_cosine))


def test_noise_refuses_an_average_of_another_tree():
  with pytest.raises(ValueError, match="`ema` must have the structure"):
    noise_at(np.ones(6), rows=4, ema={"a": jnp.ones(2)})


def test_noise_refuses_a_gradient_that_is_not_finite():
  with pytest.raises(ValueError, match="`params` must have a finite gradient"):
    noise_at(np.full(6, np.inf), rows=4)

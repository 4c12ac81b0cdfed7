"""The noise of batches, against NumPy."""

import math

from flax import nnx
import jax
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


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda ema: {"a": jnp.ones(2)}, "got nothing. Of a state that"),
    (lambda ema: jax.tree.map(lambda x: x[None], ema), r"got shape \[1, "),
  ],
)
def test_noise_refuses_an_average_of_other_arrays(change, match):
  ema = change(quadratic.tree(np.ones(6)))
  with pytest.raises(ValueError, match=match):
    noise_at(np.ones(6), rows=4, ema=ema)


def test_noise_takes_the_average_of_an_nnx_optimizer():
  params = {"w": nnx.Param(jnp.arange(3.0))}
  arguments = lambda w, x: jnp.mean((x @ w["w"][...]) ** 2), params, jnp.eye(3)
  noise = sharpness.gradient_noise(
    *arguments, rows=1, ema={"w": nnx.Variable(jnp.ones(3))}
  )
  np.testing.assert_allclose(noise.ema_cosine, 3 / 15**0.5)


def test_noise_refuses_a_gradient_that_is_not_finite():
  with pytest.raises(ValueError, match="`params` must have a finite gradient"):
    noise_at(np.full(6, np.inf), rows=4)

"""Slices of the loss, against the quadratic."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import quadratic

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")


def test_loss_on_a_plane_is_the_loss_there():
  rng = np.random.default_rng(2)
  w, u, v = rng.normal(size=(3, 6))
  x, y = [-1.0, 0.0, 2.0], [0.0, 0.5]
  plane = sharpness.loss_on_plane(
    quadratic.loss,
    quadratic.tree(w),
    (quadratic.tree(u), quadratic.tree(v)),
    quadratic.DATA,
    x,
    y,
    batch_size=5,
  )
  loss = lambda at: at @ quadratic.HESSIAN @ at / 2
  expected = [[loss(w + a * u + b * v) for a in x] for b in y]
  assert plane.shape == (2, 3)
  np.testing.assert_allclose(plane, expected, rtol=1e-9)
  line = sharpness.loss_along_line(
    quadratic.loss, quadratic.tree(w), quadratic.tree(u), quadratic.DATA, x
  )
  np.testing.assert_allclose(line, plane[0], rtol=1e-9)


def test_a_direction_of_other_shapes_is_refused():
  w = quadratic.tree(np.ones(6))
  scalars = jax.tree.map(lambda x: x[0], w)
  with pytest.raises(ValueError, match="A direction must hold the arrays of"):
    sharpness.loss_along_line(quadratic.loss, w, scalars, quadratic.DATA, [1.0])


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

"""The loss and its gradient over a whole data set."""

from jax import numpy as jnp
import numpy as np
import pytest
import quadratic

from fsam_optax import sharpness

pytestmark = pytest.mark.usefixtures("x64")


@pytest.mark.parametrize("batch_size", [None, 8, 7])
def test_gradient_over_the_data_is_that_of_all_rows(batch_size):
  w = np.arange(6.0)
  loss, gradient = sharpness.full_gradient(
    quadratic.loss, quadratic.tree(w), quadratic.DATA, batch_size=batch_size
  )
  found = np.concatenate([gradient["a"], gradient["b"]])
  np.testing.assert_allclose(found, quadratic.HESSIAN @ w, rtol=1e-10)
  np.testing.assert_allclose(loss, w @ quadratic.HESSIAN @ w / 2, rtol=1e-10)
  mean = sharpness.mean_loss(
    quadratic.loss, quadratic.tree(w), quadratic.DATA, batch_size=batch_size
  )
  np.testing.assert_allclose(mean, loss, rtol=1e-10)


def test_a_narrow_loss_and_gradient_add_up_in_float32():
  """In bfloat16 the sum of 512 ones stops at 256."""
  loss = lambda params, rows: (params["w"] * rows).mean(dtype=jnp.bfloat16)
  params, rows = {"w": jnp.ones((), jnp.bfloat16)}, jnp.ones(512, jnp.bfloat16)
  assert sharpness.mean_loss(loss, params, rows, batch_size=1) == 1
  _, gradient = sharpness.full_gradient(loss, params, rows, batch_size=1)
  assert gradient["w"] == 1

"""The loss and its gradient over a whole data set."""

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

"""The rows of the quadratic."""

import numpy as np
import pytest
import quadratic


@pytest.fixture(scope="session")
def data():
  """24 rows whose mean outer product has the known spectrum."""
  rng = np.random.default_rng(0)
  left, _ = np.linalg.qr(rng.normal(size=(24, 6)))
  right, _ = np.linalg.qr(rng.normal(size=(6, 6)))
  x = left * np.sqrt(24 * quadratic.SPECTRUM) @ right
  return {"x": x}, right

"""Means and standard deviations: whose, and in which precision."""

import numpy as np
import pytest

from fsam_optax.experiments.lab import splits


def save(path, x, test=4):
  y = np.arange(len(x)) % 2
  np.savez(
    path, x_train=x[test:], y_train=y[test:], x_test=x[:test], y_test=y[:test]
  )
  return str(path)


def standardized(pool, found):
  """What the network sees of the rows of the first seed."""
  rows = pool.x[found.train_rows[0]]
  return (rows - found.mean[0]) / found.standard_deviation[0]


def test_every_feature_of_a_table_has_its_own_scale(tmp_path):
  rng = np.random.default_rng(0)
  scale = np.array([1e-6, 1.0, 1e6])
  x = rng.normal(size=(64, 3)) * scale + 100 * scale
  pool = splits.load(save(tmp_path / "a.npz", x))
  found = splits.split(pool, [0, 1], 0.0)
  assert found.mean.shape == found.standard_deviation.shape == (2, 3)
  # In the file, test rows come last in the pool.
  rows = np.concatenate([x[4:], x[:4]])[found.train_rows[0]]
  expected = (rows - rows.mean(0)) / rows.std(0)
  np.testing.assert_allclose(
    standardized(pool, found), expected, rtol=1e-4, atol=1e-4
  )


def test_every_channel_has_its_own_scale(tmp_path):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(64, 6, 6, 3)) * [1, 50, 0.1] + [0, 100, 7]
  pool = splits.load(save(tmp_path / "a.npz", x))
  found = splits.split(pool, [3], 0.0)
  seen = standardized(pool, found)
  np.testing.assert_allclose(seen.mean((0, 1, 2)), 0, atol=1e-4)
  np.testing.assert_allclose(seen.std((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("constant", [0.1, 1e9 + 0.1, 0.0, -7.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_features_are_0_and_not_divided_by_it(
  tmp_path, constant, dtype
):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(41, 3)).astype(dtype)
  x[:, 1] = constant
  pool = splits.load(save(tmp_path / "a.npz", x))
  found = splits.split(pool, [0], 0.0)
  assert found.standard_deviation[0, 1] == 1
  seen = standardized(pool, found)
  np.testing.assert_allclose(seen[:, 1], 0, atol=1e-6)
  assert abs(seen[:, 0].std() - 1) < 1e-5

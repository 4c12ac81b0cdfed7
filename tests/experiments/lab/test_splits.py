"""The rows and labels of each seed, and the scale of its inputs."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.lab import splits as splits_lib


@pytest.fixture(scope="module")
def mnist():
  return splits_lib.load("mnist", 14)


def save(path, x, test=4):
  """A user's file, whose first rows are those of the test."""
  y = np.arange(len(x)) % 2
  np.savez(
    path, x_train=x[test:], y_train=y[test:], x_test=x[:test], y_test=y[:test]
  )
  return str(path)


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_splits_are_disjoint_and_of_the_promised_sizes(name, mnist):
  pool = mnist if name == "mnist" else splits_lib.load(name)
  splits = splits_lib.split(pool, [3, 4], 0.4)
  for i in range(2):
    rows = np.concatenate(
      [
        splits.train_rows[i],
        splits.validation_rows[i],
        splits.test_rows[i],
      ]
    )
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(pool.y)
  sizes = [
    r.shape[1]
    for r in (splits.train_rows, splits.validation_rows, splits.test_rows)
  ]
  assert sizes == ([1000, 1000, 3000] if name == "mnist" else [800, 300, 697])


def test_npz_keeps_its_test_rows_and_validates_on_training_rows(tmp_path):
  pool = splits_lib.load(save(tmp_path / "mine.npz", normal(50, 6), test=10))
  sizes = (pool.train_size, pool.validation_size, pool.test_size)
  assert sizes == (32, 8, 10)
  splits = splits_lib.split(pool, range(3), 0.25)
  np.testing.assert_array_equal(splits.test_rows, [np.arange(40, 50)] * 3)
  used = np.concatenate([splits.train_rows, splits.validation_rows], axis=1)
  np.testing.assert_array_equal(np.sort(used), [np.arange(40)] * 3)


def test_npz_of_four_rows_is_refused(tmp_path):
  with pytest.raises(data.DataError, match="5 training rows at least"):
    splits_lib.load(save(tmp_path / "few.npz", normal(8, 6)))


# Means and standard deviations.


def standardized(pool, found):
  """What the network sees of the rows of the first seed."""
  rows = pool.x[found.train_rows[0]]
  return (rows - found.mean[0]) / found.standard_deviation[0]


def test_every_feature_of_a_table_has_the_scale_of_its_training_rows(tmp_path):
  scale = np.array([1e-6, 1.0, 1e6])
  x = normal(64, 3) * scale + 100 * scale
  pool = splits_lib.load(save(tmp_path / "a.npz", x))
  found = splits_lib.split(pool, [0, 1], 0.0)
  assert found.mean.shape == found.standard_deviation.shape == (2, 3)
  # In the file, test rows come last in the pool.
  rows = np.concatenate([x[4:], x[:4]])[found.train_rows[0]]
  expected = (rows - rows.mean(0)) / rows.std(0)
  np.testing.assert_allclose(
    standardized(pool, found), expected, rtol=1e-4, atol=1e-4
  )


def test_every_channel_has_its_own_scale(tmp_path):
  x = normal(64, 6, 6, 3) * [1, 50, 0.1] + [0, 100, 7]
  pool = splits_lib.load(save(tmp_path / "a.npz", x))
  seen = standardized(pool, splits_lib.split(pool, [3], 0.0))
  np.testing.assert_allclose(seen.mean((0, 1, 2)), 0, atol=1e-4)
  np.testing.assert_allclose(seen.std((0, 1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize("constant", [0.1, 1e9 + 0.1, 0.0, -7.3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constant_features_are_0_and_not_divided_by_it(
  tmp_path, constant, dtype
):
  x = normal(41, 3).astype(dtype)
  x[:, 1] = constant
  pool = splits_lib.load(save(tmp_path / "a.npz", x))
  found = splits_lib.split(pool, [0], 0.0)
  assert found.standard_deviation[0, 1] == 1
  seen = standardized(pool, found)
  np.testing.assert_allclose(seen[:, 1], 0, atol=1e-6)
  assert abs(seen[:, 0].std() - 1) < 1e-5

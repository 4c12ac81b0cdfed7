"""The rows and labels of each seed, and the scale of its inputs."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.lab import splits as splits_lib


def save(path, x, test=4):
  """A user's file, whose first rows are those of the test."""
  y = np.arange(len(x)) % 2
  np.savez(
    path, x_train=x[test:], y_train=y[test:], x_test=x[:test], y_test=y[:test]
  )
  return str(path)


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize(
  ("name", "sizes"),
  [("mnist", [1000, 1000, 3000]), ("digits", [800, 300, 697])],
)
def test_splits_are_disjoint_and_of_the_promised_sizes(name, sizes):
  splits = splits_lib.split(splits_lib.load(name), [3, 4], 0.4)
  parts = splits.train_rows, splits.validation_rows, splits.test_rows
  assert [x.shape[1] for x in parts] == sizes
  rows = np.sort(np.concatenate(parts, axis=1))
  np.testing.assert_array_equal(rows, [np.arange(sum(sizes))] * 2)


def test_npz_keeps_its_test_rows_and_validates_on_training_rows(tmp_path):
  pool = splits_lib.load(save(tmp_path / "mine.npz", normal(50, 6), test=10))
  sizes = (pool.train_size, pool.validation_size, pool.test_size)
  assert sizes == (32, 8, 10)
  splits = splits_lib.split(pool, range(3), 0.25)
  np.testing.assert_array_equal(splits.test_rows, [np.arange(40, 50)] * 3)
  used = np.concatenate([splits.train_rows, splits.validation_rows], axis=1)
  np.testing.assert_array_equal(np.sort(used), [np.arange(40)] * 3)


def test_other_test_rows_of_the_same_file_are_other_data(tmp_path):
  path, x = tmp_path / "mine.npz", normal(50, 6)
  prints = [
    splits_lib.load(save(path, x, test=test)).fingerprint for test in (10, 20)
  ]
  assert prints[0] != prints[1]


def test_npz_of_four_rows_is_refused(tmp_path):
  with pytest.raises(data.DataError, match="5 training rows at least"):
    splits_lib.load(save(tmp_path / "few.npz", normal(8, 6)))


# Means and standard deviations.


def standardized(pool, found):
  """What the network sees of the rows of the first seed."""
  rows = pool.x[found.train_rows[0]]
  return (rows - found.mean[0]) / found.standard_deviation[0]


@pytest.mark.parametrize(
  ("shape", "axes"),
  [((64, 3), 0), ((64, 6, 6, 3), (0, 1, 2))],
  ids=["features", "channels"],
)
def test_a_feature_or_channel_has_the_scale_of_its_training_rows(
  tmp_path, shape, axes
):
  scale = np.array([1e-6, 1.0, 1e6])
  x = normal(*shape) * scale + 100 * scale
  pool = splits_lib.load(save(tmp_path / "a.npz", x))
  found = splits_lib.split(pool, [0, 1], 0.0)
  assert found.mean.shape == found.standard_deviation.shape == (2, 3)
  # In the file, test rows come last in the pool.
  rows = np.concatenate([x[4:], x[:4]])[found.train_rows[0]]
  expected = (rows - rows.mean(axes)) / rows.std(axes)
  np.testing.assert_allclose(
    standardized(pool, found), expected, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize(
  ("constant", "noise"),
  [(0.1, 0), (1e9 + 0.1, 0), (0.0, 0), (-7.3, 0), (0.0, 1e-40)],
)
def test_constant_features_are_0_and_not_divided_by_it(
  tmp_path, constant, noise
):
  """Nor are those whose deviation float32 cannot hold."""
  x = normal(41, 3)
  x[:, 1] = constant + noise * x[:, 1]
  pool = splits_lib.load(save(tmp_path / "a.npz", x))
  found = splits_lib.split(pool, [0], 0.0)
  assert found.standard_deviation[0, 1] == 1
  seen = standardized(pool, found)
  np.testing.assert_allclose(seen[:, 1], 0, atol=1e-6)
  assert abs(seen[:, 0].std() - 1) < 1e-5

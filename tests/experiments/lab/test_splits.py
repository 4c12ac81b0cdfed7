"""The rows and labels of each seed."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.lab import splits as splits_lib


@pytest.fixture(scope="module")
def mnist():
  return splits_lib.load("mnist", 14)


@pytest.fixture
def arrays():
  """What a user's file must hold: 40 and 10 rows of three classes."""
  rng = np.random.default_rng(0)
  return {
    "x_train": rng.normal(size=(40, 6)),
    "y_train": np.arange(40) % 3,
    "x_test": rng.normal(size=(10, 6)),
    "y_test": np.arange(10) % 3,
  }


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


def test_inputs_are_standardized_by_the_training_rows_alone(mnist):
  (seed, rows, _, others, _, mean, deviation) = splits_lib.split(
    mnist, [7], 0.4
  )
  assert seed == [7]
  x = mnist.x[rows[0]].astype(np.float64)
  np.testing.assert_allclose(mean[0], x.mean(), rtol=1e-6)
  np.testing.assert_allclose(deviation[0], x.std(), rtol=1e-6)
  x = mnist.x.copy()
  x[others[0]] += 1000.0
  changed = splits_lib.split(mnist._replace(x=x), [7], 0.4)
  np.testing.assert_array_equal(changed.mean, mean)
  np.testing.assert_array_equal(changed.standard_deviation, deviation)


def test_split_of_a_seed_does_not_depend_on_the_others(mnist):
  alone, among = (
    splits_lib.split(mnist, [5], 0.4),
    splits_lib.split(mnist, [4, 5], 0.4),
  )
  for one, two in zip(alone, among, strict=True):
    np.testing.assert_array_equal(one[0], two[1])


def test_npz_keeps_its_test_rows_and_validates_on_training_rows(
  tmp_path, arrays
):
  path = tmp_path / "mine.npz"
  np.savez(path, **arrays)
  pool = splits_lib.load(str(path))
  sizes = (pool.train_size, pool.validation_size, pool.test_size)
  assert sizes == (32, 8, 10)
  splits = splits_lib.split(pool, range(3), 0.25)
  np.testing.assert_array_equal(splits.test_rows, [np.arange(40, 50)] * 3)
  used = np.concatenate([splits.train_rows, splits.validation_rows], axis=1)
  np.testing.assert_array_equal(np.sort(used), [np.arange(40)] * 3)


def test_npz_of_four_rows_is_refused(tmp_path, arrays):
  path = tmp_path / "few.npz"
  few = {name: array[:4] for name, array in arrays.items()}
  np.savez(path, **few)
  with pytest.raises(data.DataError, match="5 training rows at least"):
    splits_lib.load(str(path))

"""The digits that packages hold: the same in every command."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.lab import splits

EXPECTED = {
  "digits": (1297, 500, 8, np.float32, 1.0),
  "mnist": (4000, 1000, 28, np.uint8, 255),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_and_scale_are_the_documented_ones_in_every_command(name):
  train, test, size, dtype, white = EXPECTED[name]
  images, pool = data.load(name), splits.load(name)
  assert images.x_train.shape == (train, size, size, 1)
  assert images.x_test.shape == (test, size, size, 1)
  assert images.x_train.dtype == dtype
  assert images.x_train.min() == 0
  assert images.x_train.max() == white
  assert set(images.y_test) == set(range(10))
  # The seeds of the laboratory draw from the same, in the order of the source.
  rows = images.source_rows
  np.testing.assert_array_equal(pool.x[rows[:train]], images.x_train)
  np.testing.assert_array_equal(pool.y[rows[train:]], images.y_test)
  assert sorted(rows) == list(range(len(pool.y)))


@pytest.mark.parametrize("field", ["x_train", "y_train", "x_test", "y_test"])
def test_fingerprint_is_of_all_pixels_and_labels(field):
  images = data.load("digits")
  other = images._replace(**{field: getattr(images, field)[::-1]})
  assert other.fingerprint() != images.fingerprint()


def test_a_smaller_image_is_of_the_means_of_blocks():
  whole, half = data.load("digits"), data.load("digits", image_size=4)
  assert half.x_train.shape == (1297, 4, 4, 1)
  np.testing.assert_allclose(
    half.x_train[7, 2, 3, 0], whole.x_train[7, 4:6, 6:8, 0].mean()
  )
  x = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
  bytes_ = whole._replace(x_train=x, x_test=x)
  assert bytes_.resized(2).x_train.dtype == np.float32
  assert bytes_.resized(4).x_train.dtype == np.uint8

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
def test_rows_and_scale_are_the_documented_ones(name):
  train, test, size, dtype, white = EXPECTED[name]
  images = data.load(name)
  assert images.x_train.shape == (train, size, size, 1)
  assert images.x_test.shape == (test, size, size, 1)
  assert images.x_train.dtype == dtype
  assert images.x_train.min() == 0
  assert images.x_train.max() == white
  assert set(images.y_test) == set(range(10))
  sizes = data.REGISTRY[name].sizes
  assert sizes == (train, test, (size, size, 1), 10)


@pytest.mark.parametrize("name", EXPECTED)
def test_fingerprint_is_of_all_pixels_and_labels(name):
  images = data.load(name)
  assert images.fingerprint() == data.load(name).fingerprint()
  changed = images.y_test.copy()
  changed[0] += 1
  other = images._replace(y_test=changed)
  assert other.fingerprint() != images.fingerprint()


@pytest.mark.parametrize("name", EXPECTED)
def test_pool_of_the_seeds_holds_the_same_images_in_the_order_of_the_source(
  name,
):
  images, pool = data.load(name), splits.load(name)
  count = len(images.y_train)
  np.testing.assert_array_equal(
    pool.x[images.source_rows[:count]], images.x_train
  )
  np.testing.assert_array_equal(
    pool.y[images.source_rows[count:]], images.y_test
  )
  assert sorted(images.source_rows) == list(range(len(pool.y)))


def test_a_smaller_image_is_of_the_means_of_blocks():
  whole, half = data.load("mnist"), data.load("mnist", image_size=14)
  assert half.x_train.shape == (4000, 14, 14, 1)
  assert half.x_train.dtype == np.float32
  np.testing.assert_allclose(
    half.x_train[7, 5, 6, 0], whole.x_train[7, 10:12, 12:14, 0].mean()
  )
  assert data.load("mnist", image_size=28).x_train.dtype == np.uint8
  with pytest.raises(data.DataError, match="--image-size 5 divides, got rows"):
    data.load("digits", image_size=5)

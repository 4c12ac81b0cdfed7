"""The augmentation: a NumPy program's, by draws of the right frequency."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from scipy import stats

from fsam_optax.experiments.data import augmentation

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STANDARD_DEVIATION = np.array([0.2023, 0.1994, 0.2010], np.float32)


def in_numpy(options, draws, images):
  """As the authors' transforms do it: one image and one pixel at a time."""
  result = np.empty(images.shape, np.float64)
  scale = 255 if images.dtype == np.uint8 else 1
  for i, image in enumerate(images):
    height, width, _ = image.shape
    p = options.crop_padding
    if options.flip and draws.is_flipped[i]:
      image = image[:, ::-1]
    framed = np.zeros((height + 2 * p, width + 2 * p, image.shape[2]))
    framed[p : p + height, p : p + width] = image
    down, right = draws.offset[i]
    cropped = framed[down : down + height, right : right + width]
    normal = (cropped / scale - MEAN) / STANDARD_DEVIATION
    if draws.is_cut[i]:
      down, right = draws.corner[i]
      for y in range(max(0, down), min(height, down + options.cutout)):
        for x in range(max(0, right), min(width, right + options.cutout)):
          normal[y, x] = 0
    result[i] = normal
  return result


@pytest.mark.parametrize(
  "options",
  [
    augmentation.Augmentation(),
    augmentation.Augmentation(cutout_probability=1.0, cutout=7),
    augmentation.Augmentation(flip=False, crop_padding=0),
    augmentation.Augmentation(cutout=0, cutout_probability=0.0),
  ],
  ids=["paper", "always cut", "cut only", "no cut"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augmentation_is_that_of_a_plain_numpy_program(options, dtype):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (24, 32, 32, 3)).astype(dtype)
  draws = augmentation.draw(options, jax.random.key(1), images.shape)
  found = jax.jit(
    lambda draws, images: augmentation.augment(
      options, draws, images, MEAN, STANDARD_DEVIATION
    )
  )(draws, images)
  assert found.dtype == jnp.float32
  expected = in_numpy(options, jax.tree.map(np.asarray, draws), images)
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_draws_have_the_frequencies_of_the_recipe():
  rows = 40_000
  draws = augmentation.draw(
    augmentation.Augmentation(), jax.random.key(0), (rows, 32, 32, 3)
  )
  four_errors = 4 * 0.5 / rows**0.5
  assert abs(draws.is_flipped.mean() - 0.5) < four_errors
  assert abs(draws.is_cut.mean() - 0.5) < four_errors
  for drawn, low, high in ((draws.offset, 0, 9), (draws.corner, -8, 24)):
    for axis in range(2):
      counts = np.bincount(np.asarray(drawn[:, axis]) - low)
      assert len(counts) == high - low
      assert stats.chisquare(counts).pvalue > 1e-3
  assert abs(np.corrcoef(draws.offset.T)[0, 1]) < 4 / rows**0.5

"""Augmentation of a batch of images, inside a compiled step.

In the order of the authors' code: flip, crop out of a black frame, normalize,
and Cutout, which fills with the mean. What chance decides is drawn first, from
one key for the whole batch, so that the numbers do not depend on the devices.
"""

from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np


class Augmentation(NamedTuple):
  """What is done to the images that are trained on.

  Attributes:
    flip: whether half of the images are mirrored, left to right.
    crop_padding: width of the black frame, in pixels, out of which is cropped.
    cutout: side of the square that Cutout erases, in pixels; what lies outside
      of the image is cut off.
    cutout_probability: fraction of the images that it erases in.

  References:
    DeVries and Taylor, `Improved Regularization of Convolutional Neural
    Networks with Cutout <https://arxiv.org/abs/1708.04552>`_, 2017
  """

  flip: bool = True
  crop_padding: int = 4
  cutout: int = 16
  cutout_probability: float = 0.5


class Draws(NamedTuple):
  """What chance decides for a batch.

  Attributes:
    is_flipped: shape `[B]`, bool.
    offset: of the crop in the framed image, down and right, shape `[B, 2]`.
    is_cut: shape `[B]`, bool.
    corner: of the erased square, down and right, shape `[B, 2]`.
  """

  is_flipped: jax.Array
  offset: jax.Array
  is_cut: jax.Array
  corner: jax.Array


def draw(
  augmentation: Augmentation, key: jax.Array, shape: tuple[int, ...]
) -> Draws:
  """Draws for a batch of images of shape `[B, H, W, C]`."""
  rows, height, width = shape[:3]
  flip, offset, cut, corner = jax.random.split(key, 4)
  half = augmentation.cutout // 2
  return Draws(
    is_flipped=jax.random.bernoulli(flip, 0.5 * augmentation.flip, (rows,)),
    offset=jax.random.randint(
      offset, (rows, 2), 0, 2 * augmentation.crop_padding + 1
    ),
    is_cut=jax.random.bernoulli(cut, augmentation.cutout_probability, (rows,)),
    corner=jax.random.randint(
      corner, (rows, 2), -half, jnp.array([height - half, width - half])
    ),
  )


def normalize(
  images: jax.Array, mean: np.ndarray, standard_deviation: np.ndarray
) -> jax.Array:
  """Normalizes each channel, in the dtype of the mean.

  Images of integers are divided by 255 first. The moments have shape `[C]`.
  """
  unit = 255 if jnp.issubdtype(images.dtype, jnp.integer) else 1
  return (images.astype(mean.dtype) / unit - mean) / standard_deviation


def augment(
  augmentation: Augmentation,
  draws: Draws,
  images: jax.Array,
  mean: np.ndarray,
  standard_deviation: np.ndarray,
) -> jax.Array:
  """Augments and normalizes images `[B, H, W, C]`; see :func:`normalize`."""
  height, width, channels = images.shape[1:]
  if augmentation.flip:
    mirror = draws.is_flipped[:, None, None, None]
    images = jnp.where(mirror, images[:, :, ::-1], images)
  if p := augmentation.crop_padding:
    framed = jnp.pad(images, ((0, 0), (p, p), (p, p), (0, 0)))
    images = jax.vmap(
      lambda image, at: jax.lax.dynamic_slice(
        image, (at[0], at[1], 0), (height, width, channels)
      )
    )(framed, draws.offset)
  # Before Cutout, whose 0 is then the mean of the channel, and after the crop,
  # whose black frame is black before it.
  images = normalize(images, mean, standard_deviation)
  if augmentation.cutout and augmentation.cutout_probability:
    down = jnp.arange(height) - draws.corner[:, :1]
    right = jnp.arange(width) - draws.corner[:, 1:]
    is_in = lambda distance: (distance >= 0) & (distance < augmentation.cutout)
    is_erased = (
      is_in(down)[:, :, None]
      & is_in(right)[:, None, :]
      & draws.is_cut[:, None, None]
    )
    images = jnp.where(is_erased[..., None], 0, images)
  return images

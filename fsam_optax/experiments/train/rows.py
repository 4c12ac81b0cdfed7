"""The images of a run: what a seed trains on, and what it is evaluated on."""

import dataclasses
import sys
from typing import NamedTuple, Optional

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import cifar
from fsam_optax.experiments.data import label_noise
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.recipes import Recipe

# One that float32 holds.
_LEAST_SPREAD = float(np.finfo(np.float32).tiny)
_VALUES_AT_A_TIME = 2**22


class Dataset(NamedTuple):
  """What is trained and evaluated on.

  Attributes:
    x: training images, shape ``[N, H, W, C]``.
    y: their labels, after the noise, shape ``[N]``, int32.
    x_evaluated: what every epoch ends with, shape ``[M, H, W, C]``.
    y_evaluated: their labels, shape ``[M]``, int32.
    evaluated: ``"test"`` or ``"validation"``.
  """

  x: np.ndarray
  y: np.ndarray
  x_evaluated: np.ndarray
  y_evaluated: np.ndarray
  evaluated: str


def load(
  source: Optional[str], recipe: Recipe, config: Config
) -> tuple[data.Images, Config]:
  """Loads the images, and fills in what the configuration takes from them.

  Args:
    source: name or path; a path that says nothing else is of the recipe's
      data set.
    recipe: the recipe.
    config: of the flags.

  Returns:
    The images and the configuration.

  Raises:
    FlagError: if there are no such images, or they do not fit the flags.
  """
  if source is None:
    archive = cifar.FORMATS[recipe.dataset].archive
    raise FlagError(
      "--data",
      f"must be given: the path of {archive}, which is at "
      "www.cs.toronto.edu/~kriz, or of the folder that it unpacks to",
    )
  try:
    name = data.name_of(source, otherwise=recipe.dataset)
    images = data.load(
      source, image_size=config.images.image_size, otherwise=recipe.dataset
    )
  except data.DataError as error:
    raise FlagError("--data", error) from error
  _check(images, config)
  for note in images.notes:
    print(f"note: {note}", file=sys.stderr)
  if images.white:  # As the compiled step divides integers.
    images = images._replace(
      x_train=images.x_train / np.float32(images.white),
      x_test=images.x_test / np.float32(images.white),
    )
  is_recipes = name == recipe.dataset
  kind = recipe.label_noise_kind if is_recipes else "symmetric"
  mean, standard_deviation = _moments(images)
  chosen = config.images
  filled = dataclasses.replace(
    chosen,
    mean=chosen.mean or mean,
    standard_deviation=chosen.standard_deviation or standard_deviation,
    label_noise_kind=chosen.label_noise_kind or kind,
  )
  if config.network.dtype != "float64":
    images = _in_float32(images, standard_deviation)
  return images, dataclasses.replace(config, images=filled)


def _in_float32(
  images: data.Images, standard_deviation: tuple[float, ...]
) -> data.Images:
  """The images in float32, where that tells them apart.

  Their mean is subtracted in the compiled step, on the scale that they have.
  """
  if images.x_train.dtype == np.float64:
    largest = np.abs(images.x_train).max(axis=(0, 1, 2))
    # Half of the distance between two numbers of float32 of that size.
    rounding = largest * 2.0**-24
    is_lost = rounding > np.asarray(standard_deviation) / 256
    if is_lost.any():
      worst = int(np.argmax(is_lost))
      raise FlagError(
        "--data",
        "must hold images whose differences survive float32, got values up to "
        f"{largest[worst]:g} with a standard deviation of "
        f"{standard_deviation[worst]:g} in channel {worst}. Subtract their "
        "mean before you save them, or give --dtype float64",
      )
  narrow = lambda x: x.astype(np.float32) if x.dtype == np.float64 else x
  return images._replace(
    x_train=narrow(images.x_train), x_test=narrow(images.x_test)
  )


def _moments(
  images: data.Images,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and standard deviation of each channel: published, or measured."""
  x = images.x_train
  is_integer = x.dtype == np.uint8
  if is_integer and images.mean and images.standard_deviation:
    return images.mean, images.standard_deviation
  scale = 255 if is_integer else 1
  mean, spread = _measured(x)
  # A channel that is constant stays so; rounded, its deviation may not be 0.
  low = x.min((0, 1, 2))
  is_constant = low == x.max((0, 1, 2))
  mean = np.where(is_constant, low, mean) / scale
  spread = np.where(is_constant | (spread < _LEAST_SPREAD), scale, spread)
  return tuple(mean.tolist()), tuple((spread / scale).tolist())


def _measured(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each channel, in float64.

  A part of the rows at a time, or uint8 would need nine times its memory.
  """
  rows = max(1, _VALUES_AT_A_TIME // x[0].size)
  parts = [x[i : i + rows] for i in range(0, len(x), rows)]
  axes, number = (0, 1, 2), x[..., 0].size
  sums = [part.sum(axes, dtype=np.float64) for part in parts]
  mean = np.sum(sums, axis=0) / number
  squares = np.sum([((part - mean) ** 2).sum(axes) for part in parts], axis=0)
  return mean, np.sqrt(squares / number)


def _check(images: data.Images, config: Config) -> None:
  """Raises unless the images fit the flags."""
  shape = images.image_shape
  if shape is None:
    raise FlagError(
      "--data",
      "must hold images, [n, height, width] or [n, height, width, channels], "
      f"got rows of shape {list(images.x_train.shape[1:])}",
    )
  for flag, values in (
    ("--mean", config.images.mean),
    ("--standard-deviation", config.images.standard_deviation),
  ):
    if values is not None and len(values) not in (1, shape[-1]):
      raise FlagError(
        flag,
        f"must be one number, or one for each of the {shape[-1]} channels, got "
        f"{len(values)}",
      )
  if config.images.validation >= len(images.y_train):
    raise FlagError(
      "--validation",
      f"must be below the {len(images.y_train)} training rows, got "
      f"{config.images.validation}",
    )
  assert config.network.model is not None
  least = networks.REGISTRY[config.network.model].least_image
  if min(shape[:2]) < least:
    raise FlagError(
      "--model",
      f"{config.network.model} must have images of {least} x {least} pixels at "
      f"least, got {shape[0]} x {shape[1]}. Use resnet",
    )


def dataset_of(images: data.Images, config: Config, seed: int) -> Dataset:
  """The rows and labels of a seed."""
  labels, held_out = images.y_train, config.images.validation
  x, order = images.x_train, np.arange(len(labels))
  x_evaluated, y_evaluated = images.x_test, images.y_test
  if held_out:
    order = np.random.default_rng((seed, 2)).permutation(len(labels))
    held, order = np.split(order, [held_out])
    order.sort()
    x_evaluated, y_evaluated = x[held], labels[held]
    x = x[order]
  assert config.images.label_noise_kind is not None
  noisy = label_noise.corrupt(
    labels[order],
    images.classes,
    config.images.label_noise,
    config.images.label_noise_kind,
    rng=np.random.default_rng((seed, 1)),
    targets=images.noise_targets,
  )
  evaluated = "validation" if held_out else "test"
  return Dataset(x, noisy, x_evaluated, y_evaluated, evaluated)

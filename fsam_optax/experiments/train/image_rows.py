"""The rows of a run: what a seed trains on, and what it is evaluated on."""

from typing import NamedTuple

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import cifar
from fsam_optax.experiments.data import label_noise
from fsam_optax.experiments.train import flag_checks
from fsam_optax.experiments.train.flags_and_recipes import RECIPES
from fsam_optax.experiments.train.flags_and_recipes import Settings

NOISE_STREAM, SPLIT_STREAM = 1, 2


class Rows(NamedTuple):
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


def load(settings: Settings) -> tuple[data.Images, Settings]:
  """Loads the images, and completes the configuration by them.

  A path that no data set recognizes is of the recipe's.

  Raises:
    FlagError: if there are no such images, or they do not fit the flags.
  """
  flag_checks.check_flags(settings)
  recipe = RECIPES[settings.recipe]
  if settings.data is None:
    archive = cifar.FORMATS[recipe.dataset].archive
    raise FlagError(
      "--data",
      f"must be given: the path of {archive}, which is at "
      "www.cs.toronto.edu/~kriz, or of the folder that it unpacks to",
    )
  try:
    images = data.load(
      settings.data,
      image_size=settings.images.image_size,
      otherwise=recipe.dataset,
    )
    if images.white:  # As the compiled step divides integers.
      images = images._replace(
        x_train=images.x_train / np.float32(images.white),
        x_test=images.x_test / np.float32(images.white),
        white=None,
      )
  except data.DataError as error:
    raise FlagError("--data", error) from error
  return images, flag_checks.config_of(settings, images)


def unread(settings: Settings) -> tuple[data.Images, Settings]:
  """Images of the recipe's size that take no memory, for a dry run."""
  flag_checks.check_flags(settings)
  name = RECIPES[settings.recipe].dataset
  sizes = data.REGISTRY[name].sizes
  assert sizes is not None  # Those of a recipe are known.
  x, y = np.zeros((1, *sizes.image), np.uint8), np.zeros(1, np.int32)
  one = data.Images(
    *(name, x, y, x, y, sizes.classes), mean=(0.5,), standard_deviation=(0.25,)
  )
  try:
    one = one.resized(settings.images.image_size)
  except data.DataError as error:
    raise FlagError("--data", error) from error
  many = lambda x, rows: np.broadcast_to(x, (rows, *x.shape[1:]))
  images = one._replace(
    x_train=many(one.x_train, sizes.train),
    y_train=many(y, sizes.train),
    x_test=many(one.x_test, sizes.test),
    y_test=many(y, sizes.test),
    white=None,
  )
  return images, flag_checks.config_of(settings, images)


def rows_of(images: data.Images, config: Settings, seed: int) -> Rows:
  """The rows and labels of a seed."""
  held_out, order = config.images.validation, np.arange(len(images.y_train))
  x, x_evaluated, y_evaluated = images.x_train, images.x_test, images.y_test
  if held_out:
    rng = np.random.default_rng((seed, SPLIT_STREAM))
    held, order = np.split(rng.permutation(len(order)), [held_out])
    order.sort()
    x, x_evaluated, y_evaluated = x[order], x[held], images.y_train[held]
  noisy = label_noise.corrupt(
    images.y_train[order],
    images.classes,
    config.images.label_noise,
    config.images.label_noise_kind,
    rng=np.random.default_rng((seed, NOISE_STREAM)),
    targets=images.noise_targets,
  )
  evaluated = "validation" if held_out else "test"
  return Rows(x, noisy, x_evaluated, y_evaluated, evaluated)

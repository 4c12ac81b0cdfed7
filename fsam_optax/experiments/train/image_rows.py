"""The rows of a run: what a seed trains on, and what it is evaluated on."""

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import cifar
from fsam_optax.experiments.data import label_noise
from fsam_optax.experiments.train import flag_checks
from fsam_optax.experiments.train.flags_and_recipes import RECIPES
from fsam_optax.experiments.train.flags_and_recipes import Settings

NOISE_STREAM, SPLIT_STREAM = 1, 2


def load(settings: Settings) -> tuple[data.Images, Settings]:
  """Loads the images, and completes the configuration by them.

  A dry run without a path has images of the recipe's size.

  Raises:
    FlagError: if there are no such images, or they do not fit the flags.
  """
  flag_checks.check_flags(settings)
  is_read = settings.data is not None or not settings.dry_run
  try:
    images = (_read if is_read else _unread)(settings)
  except data.DataError as error:
    raise FlagError("--data", error) from error
  return images, flag_checks.config_of(settings, images)


def _read(settings: Settings) -> data.Images:
  """A path that no data set recognizes is of the recipe's."""
  dataset = RECIPES[settings.recipe].dataset
  if settings.data is None:
    raise data.DataError(
      f"must be given: the path of {cifar.FORMATS[dataset].archive}, which is "
      "at www.cs.toronto.edu/~kriz, or of the folder that it unpacks to"
    )
  images = data.load(
    settings.data, image_size=settings.images.image_size, otherwise=dataset
  )
  if images.white:  # As the compiled step divides integers.
    images = images._replace(
      x_train=images.x_train / np.float32(images.white),
      x_test=images.x_test / np.float32(images.white),
      white=None,
    )
  return images


def _unread(settings: Settings) -> data.Images:
  """Images of the recipe's size that take no memory."""
  name = RECIPES[settings.recipe].dataset
  sizes = data.REGISTRY[name].sizes
  assert sizes is not None  # Those of a recipe are known.
  x, y = np.zeros((1, *sizes.image), np.uint8), np.zeros(1, np.int32)
  one = data.Images(
    *(name, x, y, x, y, sizes.classes), mean=(0.5,), standard_deviation=(0.25,)
  ).resized(settings.images.image_size)
  many = lambda x, rows: np.broadcast_to(x, (rows, *x.shape[1:]))
  return one._replace(
    x_train=many(one.x_train, sizes.train),
    y_train=many(y, sizes.train),
    x_test=many(one.x_test, sizes.test),
    y_test=many(y, sizes.test),
    white=None,
  )


def rows_of(images: data.Images, config: Settings, seed: int) -> data.Images:
  """The rows of a seed, its noisy labels included.

  In place of the test rows stand those that it holds out, if it does.
  """
  if held_out := config.images.validation:
    rng = np.random.default_rng((seed, SPLIT_STREAM))
    order = rng.permutation(len(images.y_train))
    held, order = np.split(order, [held_out])
    order.sort()
    images = images._replace(
      x_train=images.x_train[order],
      y_train=images.y_train[order],
      x_test=images.x_train[held],
      y_test=images.y_train[held],
      source_rows=None,
    )
  noisy = label_noise.corrupt(
    images.y_train,
    images.classes,
    config.images.label_noise,
    config.images.label_noise_kind,
    rng=np.random.default_rng((seed, NOISE_STREAM)),
    targets=images.noise_targets,
  )
  return images._replace(y_train=noisy)

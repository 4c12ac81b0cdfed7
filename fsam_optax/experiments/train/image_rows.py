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

  A path that no data set recognizes is of the recipe's. A dry run without a
  path has images of the recipe's sizes.

  Raises:
    FlagError: if there are no such images, or they do not fit the flags.
  """
  flag_checks.check_flags(settings)
  dataset, size = RECIPES[settings.recipe].dataset, settings.images.image_size
  if settings.data is None and not settings.dry_run:
    raise FlagError(
      "--data",
      f"must be given: the path of {cifar.FORMATS[dataset].archive}, which is "
      "at www.cs.toronto.edu/~kriz, or of the folder that it unpacks to",
    )
  try:
    if settings.data is None:
      images = cifar.unread(dataset, size)
    else:
      images = data.load(settings.data, image_size=size, otherwise=dataset)
  except data.DataError as error:
    raise FlagError("--data", error) from error
  if images.white:  # As the compiled step divides integers.
    images = images._replace(
      x_train=images.x_train / np.float32(images.white),
      x_test=images.x_test / np.float32(images.white),
      white=None,
    )
  return images, flag_checks.config_of(settings, images)


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

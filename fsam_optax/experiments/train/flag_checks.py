"""The configuration of a run: all that its numbers depend on, but for the data.

What the flags leave open is taken from the recipe, the network and the images.
What must hold between flags is checked here.
"""

import contextlib
import dataclasses
import math
import re
from typing import Iterator

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import flags_and_recipes
from fsam_optax.experiments.train.flags_and_recipes import Settings


def config_of(settings: Settings, images: data.Images) -> Settings:
  """The configuration: the flags, with what they leave open.

  Raises:
    FlagError: if flags contradict each other or do not fit the images.
  """
  network, chosen = settings.network, settings.images
  usual = _network_of(settings)
  mean, standard_deviation = images.moments()
  side = min(images.x_train.shape[1:3], default=0)
  whole = lambda flag, fraction: (
    round(fraction * side) if flag is None else flag
  )
  config = dataclasses.replace(
    settings,
    network=dataclasses.replace(
      network,
      model=usual.name,
      depth=network.depth or usual.depth,
      width=network.width or usual.width,
    ),
    images=dataclasses.replace(
      chosen,
      # Of the 32 pixels of CIFAR these are the authors' 4 and 16.
      crop_padding=whole(chosen.crop_padding, 1 / 8),
      cutout=whole(chosen.cutout, 1 / 2),
      mean=chosen.mean or mean,
      standard_deviation=chosen.standard_deviation or standard_deviation,
    ),
  )
  _check_images(config, images)
  return config


def _network_of(settings: Settings) -> networks.Network:
  recipe = flags_and_recipes.RECIPES[settings.recipe]
  return networks.REGISTRY[settings.network.model or recipe.model]


_OF_THE_AVERAGE = {"--sigma", "--lmbda", "--average", "--ema-gradient"}


def check_flags(settings: Settings) -> None:
  """Raises a FlagError where two flags contradict each other."""
  ascent, descent = settings.ascent, settings.descent
  usual, depth = _network_of(settings), settings.network.depth
  if must := depth and usual.depth_rule(depth):
    raise FlagError("--depth", f"must be {must} for {usual.name}, got {depth}")
  if not ascent.sync_perturbation and descent.sharding == "fsdp":
    raise FlagError(
      "--no-sync-perturbation",
      "must have --sharding replicated, where a device has all parameters",
    )
  reasons = {"sgd": "which does not ascend", "sam": "which has no average"}
  if reason := reasons.get(ascent.optimizer):
    without = flags_and_recipes.by_flag(
      flags_and_recipes.Ascent(optimizer=ascent.optimizer)
    )
    for flag, value in flags_and_recipes.by_flag(ascent).items():
      is_read = ascent.optimizer == "sam" and flag not in _OF_THE_AVERAGE
      if value != without[flag] and not is_read:
        raise FlagError(
          flag,
          f"must be left out with --optimizer {ascent.optimizer}, {reason}",
        )
  if ascent.average == "optimizer" and ascent.lmbda != descent.momentum:
    raise FlagError(
      "--lmbda",
      f"must be the momentum, {descent.momentum:g}, with --average optimizer, "
      f"got {ascent.lmbda:g}",
    )


def _check_images(config: Settings, images: data.Images) -> None:
  shape = images.x_train.shape[1:]
  if len(shape) != 3:
    raise FlagError(
      "--data",
      "must hold images, [n, height, width] or [n, height, width, channels], "
      f"got rows of shape {list(shape)}",
    )
  *sides, channels = shape
  for flag, lower in (("--mean", -math.inf), ("--standard-deviation", 0)):
    moments = config.by_flag()[flag]
    if len(moments) not in (1, channels):
      raise FlagError(
        flag,
        f"must be one number, or one for each of the {channels} channels, got "
        f"{len(moments)}",
      )
    with np.errstate(over="ignore"):
      narrow = np.array(moments, np.float32)
    if not np.all((lower < narrow) & (narrow < math.inf)):
      raise FlagError(flag, f"must be in ({lower}, inf), got {moments}")
  if message := _network_of(config).check_rows(shape):
    raise FlagError("--model", message)
  rows = len(images.y_train)
  for flag, value, most, what in (
    ("--validation", config.images.validation, rows - 1, "training rows"),
    ("--batch-size", config.descent.batch_size, rows - config.images.validation,
     "rows that are left to train on"),
    ("--crop-padding", config.images.crop_padding or 0, min(sides) - 1,
     "pixels of a side"),
  ):  # fmt: skip
    if value > most:
      raise FlagError(
        flag, f"must be at most {most}, by the {what}, got {value}"
      )


@contextlib.contextmanager
def naming_flags() -> Iterator[None]:
  """Makes an error of the library, which names an option, one of its flag."""
  try:
    yield
  except (TypeError, ValueError) as error:
    match = re.match(r"`(\w+)` (.*)", str(error), re.DOTALL)
    flag = f"--{match[1].replace('_', '-')}" if match else ""
    options = flags_and_recipes.Ascent(), flags_and_recipes.Descent()
    if match is None or flag not in flags_and_recipes.by_flag(*options):
      raise
    message = re.sub(r"`(\w+)`", r"\1", match[2]).removesuffix(".")
    raise FlagError(flag, message) from error

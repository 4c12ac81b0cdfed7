"""The configuration of a run: all that its numbers depend on, but for the data.

What the flags leave open is taken from the recipe, the network and the images.
What must hold between flags is checked here.
"""

import contextlib
import dataclasses
import math
import re
from typing import Any, Iterator, NamedTuple

from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import flags_and_recipes


class Config(NamedTuple):
  """Everything that the numbers of a run depend on, but its data and seed.

  Attributes:
    name: of what is trained: the recipe, or the images and the network.
    ascent, descent, network, images: the groups of the flags, complete.
  """

  name: str
  ascent: flags_and_recipes.Ascent
  descent: flags_and_recipes.Descent
  network: flags_and_recipes.Network
  images: flags_and_recipes.Images

  def by_flag(self) -> dict[str, Any]:
    """All values, as ``{"--rho": 0.2, ...}``."""
    return flags_and_recipes.by_flag(*self[1:])


def config_of(
  settings: flags_and_recipes.Settings, images: data.Images
) -> Config:
  """The configuration of the flags, with what they leave open.

  Raises:
    FlagError: if flags contradict each other or do not fit the images.
  """
  recipe = flags_and_recipes.RECIPES[settings.recipe]
  network = settings.network
  model = network.model or recipe.model
  mean, standard_deviation = images.moments()
  is_recipes = images.name == recipe.dataset and model == recipe.model
  usual, chosen = networks.REGISTRY[model], settings.images
  side = min(images.x_train.shape[1:3], default=0)
  whole = lambda flag, fraction: (
    round(fraction * side) if flag is None else flag
  )
  config = Config(
    settings.recipe if is_recipes else f"{images.name}, {model}",
    settings.ascent,
    settings.descent,
    dataclasses.replace(
      network,
      model=model,
      depth=network.depth or usual.depth,
      width=network.width or usual.width,
    ),
    dataclasses.replace(
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


_OF_THE_AVERAGE = {
  *("--sigma", "--lmbda", "--average", "--order"),
  *("--accumulator-dtype", "--ema-gradient"),
}


def check_flags(settings: flags_and_recipes.Settings) -> None:
  """Raises a FlagError where two flags contradict each other."""
  ascent, descent = settings.ascent, settings.descent
  network, depth = settings.network, settings.network.depth
  model = network.model or flags_and_recipes.RECIPES[settings.recipe].model
  if must := depth and networks.REGISTRY[model].check_depth(depth):
    raise FlagError("--depth", f"must be {must}, got {depth}")
  if ascent.eta and not ascent.adaptive:
    raise FlagError(
      "--eta", "must have --adaptive, whose metric it is added to"
    )
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


def _check_images(config: Config, images: data.Images) -> None:
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
    if not all(lower < x < math.inf for x in moments):
      raise FlagError(flag, f"must be in ({lower}, inf), got {moments}")
  if message := networks.REGISTRY[config.network.model].check_rows(shape):
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

"""The configuration of a run: all that its numbers depend on, but for the data.

It is complete when it exists: what the flags leave open, the recipe, the
network and the images have said. What must hold between flags is checked here.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import re
from typing import Any, NamedTuple

from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train.settings import RECIPES
from fsam_optax.experiments.train.settings import Ascent
from fsam_optax.experiments.train.settings import Descent
from fsam_optax.experiments.train.settings import Images
from fsam_optax.experiments.train.settings import Network
from fsam_optax.experiments.train.settings import Settings
from fsam_optax.experiments.train.settings import by_flag


class Config(NamedTuple):
  """Everything that the numbers of a run depend on, but its data and seed.

  Attributes:
    name: of what is trained: the recipe, or the images and the network.
    ascent, descent, network, images: the groups of the flags, complete.
  """

  name: str
  ascent: Ascent
  descent: Descent
  network: Network
  images: Images

  def by_flag(self) -> dict[str, Any]:
    """All values, as ``{"--rho": 0.2, ...}``."""
    return by_flag(*self[1:])


def config_of(settings: Settings, images: data.Images) -> Config:
  """The configuration of the flags, with what they leave open.

  Raises:
    FlagError: if flags contradict each other or do not fit the images.
  """
  recipe, network = RECIPES[settings.recipe], settings.network
  model = network.model or recipe.model
  kind = "uniform" if images.name == recipe.dataset else "symmetric"
  mean, standard_deviation = images.moments()
  is_recipes = images.name == recipe.dataset and model == recipe.model
  usual, chosen = networks.REGISTRY[model], settings.images
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
      mean=chosen.mean or mean,
      standard_deviation=chosen.standard_deviation or standard_deviation,
      label_noise_kind=chosen.label_noise_kind or kind,
    ),
  )
  _check_images(config, images)
  return config


def check_flags(settings: Settings) -> None:
  """Raises a FlagError where two flags contradict each other."""
  ascent, descent = settings.ascent, settings.descent
  network = settings.network
  model, depth = network.model or RECIPES[settings.recipe].model, network.depth
  must = depth and networks.REGISTRY[model].check_depth(depth)
  for is_wrong, flag, message in (
    (must, "--depth", f"must be {must}, got {depth}"),
    (
      descent.nesterov and not descent.momentum,
      "--nesterov",
      "must have a --momentum, got 0",
    ),
    (
      ascent.eta and not ascent.adaptive,
      "--eta",
      "must have --adaptive, whose metric it is added to",
    ),
    (
      ascent.accumulator_dtype == "float64" != network.dtype,
      "--accumulator-dtype",
      f"must have --dtype float64 to be float64, got --dtype {network.dtype}",
    ),
    (
      not ascent.sync_perturbation and descent.sharding == "fsdp",
      "--no-sync-perturbation",
      "must have --sharding replicated, where a device has all parameters",
    ),
  ):
    if is_wrong:
      raise FlagError(flag, message)
  if ascent.optimizer == "sgd":
    without = by_flag(Ascent(optimizer="sgd"))
    for flag, value in by_flag(ascent).items():
      if value != without[flag]:
        raise FlagError(
          flag, "must be left out with --optimizer sgd, which does not ascend"
        )


def _check_images(config: Config, images: data.Images) -> None:
  """Raises unless the images fit the flags."""
  shape = images.x_train.shape[1:]
  if len(shape) != 3:
    raise FlagError(
      "--data",
      "must hold images, [n, height, width] or [n, height, width, channels], "
      f"got rows of shape {list(shape)}",
    )
  *sides, channels = shape
  model = config.network.model
  for flag in ("--mean", "--standard-deviation"):
    if (number := len(config.by_flag()[flag])) not in (1, channels):
      raise FlagError(
        flag,
        f"must be one number, or one for each of the {channels} channels, got "
        f"{number}",
      )
  rows, least = len(images.y_train), networks.REGISTRY[model].least_image
  if min(sides) < least:
    raise FlagError(
      "--model",
      f"{model} must have images of {least} x {least} pixels at least, "
      f"got {sides[0]} x {sides[1]}. Use resnet",
    )
  for flag, value, most, what in (
    ("--validation", config.images.validation, rows - 1, "training rows"),
    ("--batch-size", config.descent.batch_size, rows - config.images.validation,
     "rows that are left to train on"),
    ("--crop-padding", config.images.crop_padding, min(sides) - 1,
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
    if match is None or flag not in by_flag(Ascent(), Descent()):
      raise
    message = re.sub(r"`(\w+)`", r"\1", match[2]).removesuffix(".")
    raise FlagError(flag, message) from error

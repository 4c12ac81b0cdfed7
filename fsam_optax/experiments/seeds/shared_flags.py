"""What the flags of the commands that train many small runs may say."""

import dataclasses
import pathlib
from typing import Annotated, Optional

import tyro

from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import values
from fsam_optax.experiments.data.label_noise import KINDS
from fsam_optax.experiments.seeds import recipes

LARGEST_SEED = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Data:
  """What is trained on what.

  Attributes:
    dataset: a data set by its name, by its path, or by both with a colon
      between.
    image_size: side to scale the images to, in pixels, each the mean of a block
      of pixels.
    model: mlp has two hidden layers of 64; cnn has two 3 x 3 convolutions, of
      stride 2, with 16 and 32 channels.
    label_noise: fraction of the training labels that are replaced, at least 0
      and below 1.
    label_noise_kind: by another class (symmetric), by any class and so the
      right one, too (uniform), or by one easily taken for it (asymmetric).
  """

  dataset: Annotated[
    str,
    values.value("NAME", str),
    tyro.conf.arg(help=data.describe()),
  ] = "mnist"
  image_size: Annotated[
    Optional[int],
    values.integer(1, remedy="14 halves 28 pixels", metavar="PIXELS"),
    values.default("14 for mnist, otherwise that of the images"),
  ] = None
  model: Annotated[str, values.choice(networks.REGISTRY, "NAME")] = "mlp"
  label_noise: Annotated[
    float,
    values.number(
      0,
      1,
      below=True,
      remedy="0.4 moves 40 % of the labels",
      metavar="FRACTION",
    ),
  ] = recipes.LABEL_NOISE
  label_noise_kind: Annotated[str, values.choice(KINDS, metavar="KIND")] = (
    "symmetric"
  )


Optimizers = Annotated[
  tuple[str, ...], values.some_of(optimizers.NAMES, example="sam,fsam")
]
Sigma = Annotated[
  float, values.number(0, remedy="1 is F-SAM, 0 is SAM", metavar="S")
]
Lmbda = Annotated[
  float,
  values.number(0, 1, remedy="the paper uses 0.6, 0.9 and 0.95", metavar="L"),
]
Epochs = Annotated[
  Optional[int],
  values.integer(1, 10**6, remedy="60 is usual"),
  values.default("60, on digits 100"),
]
SEEDS = values.integer(1, 10_000, remedy="64 tell F-SAM from SAM, 8 do not")
FIRST_SEED = values.integer(
  0, LARGEST_SEED, remedy="seeds count up from it", metavar="SEED"
)
_REASON = "at 0 nothing is learned"


def learning_rate(*, is_grid: bool) -> object:
  """The annotation of a learning rate, or of a grid of them."""
  return values.per_optimizer(
    optimizers.NAMES, metavar="LR", is_grid=is_grid, above_zero=_REASON
  )


def rho(*, is_grid: bool) -> object:
  """The annotation of a radius, or of a grid of them."""
  return values.per_optimizer(
    optimizers.ASCENDING, metavar="R", is_grid=is_grid
  )


def weight_decay(*, is_grid: bool) -> object:
  """The annotation of a weight decay, or of a grid of them."""
  return values.per_optimizer(optimizers.NAMES, metavar="WD", is_grid=is_grid)


@dataclasses.dataclass(frozen=True)
class Training:
  """How every run is trained.

  Attributes:
    optimizers: which of sgd, sam and fsam to train, with commas between.
    sigma: fraction of the gradient average that F-SAM subtracts.
    lmbda: decay of the gradient average of F-SAM, from 0 to 1.
    epochs: passes over the training rows.
    batch_size: rows a step, at most the training rows; what fills no whole
      batch waits for another epoch.
    output: directory to write to, made where it is missing.
  """

  optimizers: Optimizers = optimizers.NAMES
  sigma: Sigma = 1.0
  lmbda: Lmbda = 0.9
  epochs: Epochs = None
  batch_size: Annotated[
    Optional[int],
    values.integer(1, remedy="100 is usual", metavar="ROWS"),
    values.default("100"),
  ] = None
  output: pathlib.Path = pathlib.Path("compare")

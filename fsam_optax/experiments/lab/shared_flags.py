"""The flags of ``compare``, ``tune`` and ``study``, checked together."""

import dataclasses
import pathlib
from typing import Annotated, Optional

import tyro

from fsam_optax.experiments import data as data_lib
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import optimizers as optimizers_lib
from fsam_optax.experiments.common import values
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data.label_noise import KINDS
from fsam_optax.experiments.lab import arms as arms_lib
from fsam_optax.experiments.lab import splits
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Grid

# Of the others, which keep statistics of batches, `train` trains one at a time.
_MODELS = [x.name for x in networks.REGISTRY.values() if not x.has_statistics]


@dataclasses.dataclass(frozen=True)
class Data:
  """What is trained on what.

  Attributes:
    data: a data set by its name, by its path, or by both with a colon between.
    image_size: side to scale the images to, in pixels, each the mean of a block
      of pixels.
    model: mlp has two hidden layers of 64; cnn has two 3 x 3 convolutions, of
      stride 2, with 16 and 32 channels.
    label_noise: fraction of the training labels that are replaced, at least 0
      and below 1. Your own data have none unless you say so.
    label_noise_kind: by another class (symmetric), by any class and so the
      right one, too (uniform), or by one easily taken for it (asymmetric; five
      classes of CIFAR-10 have none, so that half of the fraction is wrong).
  """

  data: Annotated[
    str, values.value("NAME", str), tyro.conf.arg(help=data_lib.describe())
  ] = "mnist"
  image_size: Annotated[
    Optional[int],
    values.integer(1, metavar="PIXELS"),
    values.default("14 for mnist, otherwise that of the images"),
  ] = None
  model: Annotated[str, values.choice(_MODELS)] = "mlp"
  label_noise: Annotated[
    Optional[float],
    values.number(0, 1, below=True, metavar="FRACTION"),
    values.default(f"{tuned_values.LABEL_NOISE:g}, of your own data 0"),
  ] = None
  label_noise_kind: Annotated[str, values.choice(KINDS)] = "symmetric"


SEEDS = values.integer(1, 10_000, remedy="64 tell F-SAM from SAM, 8 do not")
_TUNED = values.default(tuned_values.describe())


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags of ``compare`` and of ``tune``.

  Attributes:
    data: what is trained on what.
    optimizers: which of sgd, sam and fsam to train.
    sigma: fraction of the gradient average that F-SAM subtracts.
    lmbda: decay of the gradient average of F-SAM, from 0 to 1.
    epochs: passes over the training rows.
    batch_size: rows a step, at most the training rows; what fills no whole
      batch waits for another epoch.
    rho: radius of the perturbation, in units of the weights: one value for sam
      and fsam, or one for each, as in sam=0.35,fsam=0.5. For `tune` a value may
      be a grid, as in 0.2:0.4:0.8.
    learning_rate: learning rate at the first step, a cosine takes it to 0: one
      value for all, or one for each, as in sgd=0.004,fsam=0.015.
    weight_decay: fraction of the weights that is added to the gradient: one
      value for all, or one for each.
    seeds: number of seeds, each with its own split, noise, initialization and
      batches, shared by the optimizers.
    first_seed: the first seed. Choose by `tune` and report by `compare` on
      seeds that differ.
    output: directory to write to, made where it is missing.
  """

  data: Data = dataclasses.field(default_factory=Data)
  optimizers: Annotated[
    tuple[str, ...], values.some_of(optimizers_lib.NAMES)
  ] = optimizers_lib.NAMES
  sigma: Annotated[
    float, values.number(0, remedy="1 is F-SAM, 0 is SAM", metavar="S")
  ] = 1.0
  lmbda: Annotated[
    float,
    values.number(0, 1, remedy="the paper uses 0.6, 0.9 and 0.95", metavar="L"),
  ] = arms_lib.LMBDA
  epochs: Annotated[
    Optional[int],
    values.integer(1, 10**6, remedy="60 is usual"),
    values.default("60, on digits 100"),
  ] = None
  batch_size: Annotated[
    Optional[int],
    values.integer(1, metavar="ROWS"),
    values.default(f"{tuned_values.BATCH_SIZE}"),
  ] = None
  rho: Annotated[
    values.PerOptimizer,
    values.per_optimizer(optimizers_lib.ASCENDING, metavar="R"),
    _TUNED,
  ] = dataclasses.field(default_factory=dict)
  learning_rate: Annotated[
    values.PerOptimizer,
    values.per_optimizer(optimizers_lib.NAMES, metavar="LR", above=True),
    _TUNED,
  ] = dataclasses.field(default_factory=dict)
  weight_decay: Annotated[
    values.PerOptimizer,
    values.per_optimizer(optimizers_lib.NAMES, metavar="WD"),
    _TUNED,
  ] = dataclasses.field(default_factory=dict)
  seeds: Annotated[
    Optional[int], SEEDS, values.default("those of the tuned values: 64 or 16")
  ] = None
  first_seed: Annotated[
    Optional[int],
    values.integer(0, metavar="SEED"),
    values.default("0 of tune, 200 of compare"),
  ] = None
  output: pathlib.Path = pathlib.Path("compare")


def recipe_of(data: Data) -> tuned_values.Recipe:
  """The recipe of the data set and network of the flags."""
  return tuned_values.recipe(data.data, data.model, data.image_size)


def laboratory(given: Settings, default_seeds: int, default_first: int) -> Lab:
  """The laboratory of the optimizers, whose data are loaded.

  The seeds to report and to search by are the same. The output directory is
  made.

  Raises:
    FlagError: if flags do not fit each other or the data.
  """
  data, recipe, pool = given.data, recipe_of(given.data), load(given.data)
  batch_size = given.batch_size or min(tuned_values.BATCH_SIZE, pool.train_size)
  if batch_size > pool.train_size:
    raise FlagError(
      "--batch-size",
      f"must be at most the {pool.train_size} training rows, got {batch_size}. "
      "Choose a smaller batch",
    )
  label_noise = data.label_noise
  if label_noise is None:
    is_published = data_lib.REGISTRY[data_lib.name_of(data.data)].is_published
    label_noise = tuned_values.LABEL_NOISE if is_published else 0.0
  if not label_noise and data.label_noise_kind != Data.label_noise_kind:
    raise FlagError("--label-noise-kind", "must have --label-noise above 0")
  first = default_first if given.first_seed is None else given.first_seed
  seeds = range(first, first + (given.seeds or default_seeds))
  files.make_output(given.output)
  return Lab(
    pool=pool,
    model=data.model,
    network=networks.REGISTRY[data.model].create,
    label_noise=label_noise,
    label_noise_kind=data.label_noise_kind,
    epochs=given.epochs or recipe.epochs,
    batch_size=batch_size,
    arms=arms_lib.of_optimizers(given.optimizers, given.sigma, given.lmbda),
    best=recipe.best,
    search_seeds=seeds,
    seeds=seeds,
    described={"sigma": given.sigma, "lmbda": given.lmbda},
  )


def load(data: Data) -> splits.Pool:
  """The data set of the flags; a FlagError where the network cannot take it."""
  try:
    pool = splits.load(data.data, recipe_of(data).image_size)
  except data_lib.DataError as error:
    raise FlagError("--data", error) from error
  if message := networks.REGISTRY[data.model].check_rows(pool.x.shape[1:]):
    raise FlagError("--model", message)
  return pool


def grids(given: Settings, *, is_grid: bool) -> dict[str, Grid]:
  """The points of each optimizer that runs, by the flags or the tuned values.

  One each where there is no grid.
  """
  names, recipe = given.optimizers, recipe_of(given.data)
  default = recipe.grid if is_grid else recipe.alone
  found = {name: default(name) for name in names}
  for what in Grid._fields:
    of, flag = getattr(given, what), f"--{what.replace('_', '-')}"
    if not is_grid and any(len(numbers) > 1 for numbers in of.values()):
      raise FlagError(
        flag, "must be one value for each optimizer; `tune` takes grids"
      )
    reading = [x for x in names if what in fields_of(x)]
    if unread := of.keys() - ({"", *reading} if reading else ()):
      what = ", ".join(sorted(unread)) or "one for all"
      raise FlagError(
        flag,
        f"must be of optimizers that run and have it, {reading}, got {what}. "
        "Leave it out, or see --optimizers",
      )
    for name in reading:
      own = of.get(name, of.get("", getattr(found[name], what)))
      found[name] = found[name]._replace(**{what: own})
  for what in ("sigma", "lmbda"):
    is_given = getattr(given, what) != getattr(Settings, what)
    if is_given and "fsam" not in names:
      raise FlagError(f"--{what}", "must be left out, for fsam does not run")
  return found


def fields_of(name: str) -> list[str]:
  """The hyperparameters of an optimizer: one that descends has no radius."""
  is_ascending = name in optimizers_lib.ASCENDING
  return [x for x in Grid._fields if x != "rho" or is_ascending]

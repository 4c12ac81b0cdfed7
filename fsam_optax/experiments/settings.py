"""The settings of a command: its flags, read and checked before any work."""

import argparse
import importlib.metadata
import math
import os
import pathlib
import tempfile
from typing import Any, Callable, NamedTuple, NoReturn, Optional

import jax
import numpy as np

import fsam_optax
from fsam_optax.experiments import data
from fsam_optax.experiments import models
from fsam_optax.experiments import recipes
from fsam_optax.experiments import training

_LARGEST_SEED = 2**32 - 1


class Settings(NamedTuple):
  """What a command works with.

  Attributes:
    pool: the data set.
    model: ``"mlp"`` or ``"cnn"``.
    label_noise: share of the training labels that are moved.
    optimizers: in the order in which they run.
    learning_rate: values for each optimizer, exactly one in ``compare``.
    rho: values for each optimizer but SGD, exactly one in ``compare``.
    sigma: of F-SAM.
    lmbda: of F-SAM.
    seeds: consecutive integers.
    epochs: passes over the training rows.
    batch_size: rows a step.
    output: directory that exists and can be written to.
    origin: one line on where default learning rates and radii come from.
  """

  pool: data.Pool
  model: str
  label_noise: float
  optimizers: tuple[str, ...]
  learning_rate: dict[str, tuple[float, ...]]
  rho: dict[str, tuple[float, ...]]
  sigma: float
  lmbda: float
  seeds: range
  epochs: int
  batch_size: int
  output: pathlib.Path
  origin: str

  def trainer(self) -> training.Trainer:
    """The trainer of all optimizers."""
    return training.Trainer(
      models.create(self.model, self.pool.classes),
      self.pool,
      sigma=self.sigma,
      lmbda=self.lmbda,
      epochs=self.epochs,
      batch_size=self.batch_size,
    )

  def config(self) -> dict[str, Any]:
    """What the JSON says about how its numbers came to be."""
    return {
      "dataset": self.pool.name,
      "model": self.model,
      "train_size": self.pool.train_size,
      "validation_size": self.pool.validation_size,
      "test_size": self.pool.test_size,
      "input_shape": list(self.pool.x.shape[1:]),
      "classes": self.pool.classes,
      "label_noise": self.label_noise,
      "optimizers": list(self.optimizers),
      "sigma": self.sigma,
      "lmbda": self.lmbda,
      "momentum": training.MOMENTUM,
      "weight_decay": training.WEIGHT_DECAY,
      "learning_rate_schedule": "cosine to 0",
      "epochs": self.epochs,
      "batch_size": self.batch_size,
      "seeds": list(self.seeds),
      "accuracy_unit": "percent",
      "train_accuracy_labels": "as trained on, noise included",
      "versions": {
        "fsam_optax": fsam_optax.__version__,
        **{
          name: importlib.metadata.version(name)
          for name in ("jax", "optax", "flax", "numpy")
        },
      },
      "device": jax.devices()[0].device_kind,
    }


def add_data_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say what is trained on what.

  Args:
    parser: of the command.
  """
  add = parser.add_argument
  add(
    "--dataset",
    default="mnist",
    metavar="NAME",
    help="mnist (5,000 digits, 14 x 14), digits (1,797 digits, 8 x 8) or the "
    "path of an .npz with x_train, y_train, x_test and y_test; default mnist",
  )
  add(
    "--model",
    default="mlp",
    choices=("mlp", "cnn"),
    help="mlp (two hidden layers of 64) or cnn (two 3 x 3 convolutions of "
    "stride 2, 16 and 32 channels); default mlp",
  )
  add(
    "--label-noise",
    type=number(0, 1, below=True, remedy="0.4 moves 40 % of the labels"),
    default=recipes.LABEL_NOISE,
    metavar="SHARE",
    help="share of the training labels that move to another class, in [0, 1); "
    f"default {recipes.LABEL_NOISE}",
  )


def add_flags(parser: argparse.ArgumentParser, *, is_grid: bool) -> None:
  """Adds the flags that ``compare`` and ``tune`` share.

  Args:
    parser: of the command.
    is_grid: whether learning rates and radii are grids.
  """
  add_data_flags(parser)
  add = parser.add_argument
  add(
    "--optimizers",
    type=_optimizers,
    default=training.OPTIMIZERS,
    metavar="LIST",
    help="which of sgd, sam and fsam to train, with commas between; default "
    "sgd,sam,fsam",
  )
  several = " or a grid of them, as in 0.2:0.4:0.8," if is_grid else ""
  origin = (
    "default a grid around the tuned values"
    if is_grid
    else f"default {_describe('rho')}"
  )
  add(
    "--rho",
    type=_per_optimizer("rho", is_grid),
    default={},
    metavar="R",
    help=f"radius of the perturbation, in units of the weights: one value"
    f"{several} for sam and fsam, or one for each, as in sam=0.35,fsam=0.5; "
    f"{origin}",
  )
  add(
    "--sigma",
    type=number(0, math.inf, remedy="1 is F-SAM, 0 is SAM"),
    default=1.0,
    metavar="S",
    help="share of the gradient average that F-SAM subtracts; default 1",
  )
  add(
    "--lmbda",
    type=number(0, 1, remedy="the paper uses 0.6, 0.9 and 0.95"),
    default=0.9,
    metavar="L",
    help="decay of the gradient average of F-SAM, in [0, 1]; default 0.9",
  )
  origin = origin if is_grid else f"default {_describe('learning_rate')}"
  add(
    "--learning-rate",
    type=_per_optimizer("learning_rate", is_grid),
    default={},
    metavar="LR",
    help=f"learning rate at the first step, a cosine takes it to 0: one value"
    f"{several} for all, or one for each, as in sgd=0.004,fsam=0.015; {origin}",
  )
  add(
    "--seeds",
    type=integer(1, 10_000, remedy="64 tell F-SAM from SAM, 8 do not"),
    metavar="N",
    help="number of seeds, each with its own split, noise, initialisation and "
    "batches, shared by the optimizers; default "
    + (
      "16 for the mlp on mnist or an .npz, 48 on digits, 4 for the cnn"
      if is_grid
      else "64 for the mlp on mnist or digits, 16 otherwise"
    ),
  )
  first = recipes.TUNING_FIRST_SEED if is_grid else recipes.FIRST_SEED
  add(
    "--first-seed",
    type=integer(0, _LARGEST_SEED, remedy="seeds count up from it"),
    default=first,
    metavar="SEED",
    help=f"the first seed; default {first}. Choose by `tune` and report by "
    "`compare` on seeds that differ",
  )
  add(
    "--epochs",
    type=integer(1, 10**6, remedy="60 is usual"),
    metavar="N",
    help="passes over the training rows; default 60, on digits 100",
  )
  add(
    "--batch-size",
    type=integer(1, 10**9, remedy="100 is usual"),
    metavar="ROWS",
    help="rows a step, at most the training rows; what fills no whole batch "
    "waits for another epoch; default 100",
  )
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("compare"),
    metavar="DIR",
    help="directory to write to, made where it is missing; default compare",
  )


def check(
  args: argparse.Namespace, parser: argparse.ArgumentParser, *, is_grid: bool
) -> Settings:
  """Turns parsed flags into settings.

  Args:
    args: what the parser returned.
    parser: the parser; its ``error`` ends the program with status 2.
    is_grid: whether learning rates and radii are grids.

  Returns:
    The settings, with the data loaded and the output directory made.
  """

  def fail(flag: str, message: object) -> NoReturn:
    parser.error(f"argument {flag}: {message}")

  pool = load_data(args, parser)
  recipe = recipes.recipe(args.dataset, args.model)
  batch_size = args.batch_size or recipe.batch_size
  if args.batch_size is None and args.dataset.endswith(".npz"):
    batch_size = min(batch_size, pool.train_size)
  if batch_size > pool.train_size:
    fail(
      "--batch-size",
      f"must be at most the {pool.train_size} training rows, got {batch_size}. "
      "Choose a smaller batch",
    )
  default_seeds = recipe.tuning_seeds if is_grid else recipe.seeds
  seeds = range(
    args.first_seed, args.first_seed + (args.seeds or default_seeds)
  )
  if seeds[-1] > _LARGEST_SEED:
    fail(
      "--first-seed",
      f"must leave the last seed at {_LARGEST_SEED} at most, got {seeds[-1]}. "
      "Start lower",
    )
  values = {}
  for flag, name, given in (
    ("--learning-rate", "learning_rate", args.learning_rate),
    ("--rho", "rho", args.rho),
  ):
    if unused := [n for n in given if n and n not in args.optimizers]:
      fail(
        flag,
        f"must name optimizers that run, got {unused[0]}, which --optimizers "
        "leaves out. Drop one or add the other",
      )
    default = getattr(recipe, f"{name}_grid" if is_grid else name)
    values[name] = {
      optimizer: given.get(
        optimizer, given.get("", _as_tuple(default[optimizer]))
      )
      for optimizer in args.optimizers
      if optimizer in default
    }
  check_output(args, parser)
  return Settings(
    pool=pool,
    model=args.model,
    label_noise=args.label_noise,
    optimizers=args.optimizers,
    learning_rate=values["learning_rate"],
    rho=values["rho"],
    sigma=args.sigma,
    lmbda=args.lmbda,
    seeds=seeds,
    epochs=args.epochs or recipe.epochs,
    batch_size=batch_size,
    output=args.output,
    origin=recipe.origin,
  )


def load_data(
  args: argparse.Namespace, parser: argparse.ArgumentParser
) -> data.Pool:
  """The data set of the flags, which the model of the flags can take.

  Args:
    args: what the parser returned.
    parser: the parser; its ``error`` ends the program with status 2.

  Returns:
    The data set.
  """
  try:
    pool = data.load(args.dataset)
  except data.DataError as error:
    parser.error(f"argument --dataset: {error}")
  if args.model == "cnn" and data.image_shape(pool) is None:
    parser.error(
      "argument --model: cnn must have images, got rows of shape "
      f"{list(pool.x.shape[1:])}. Store x_train and x_test as [n, height, "
      "width] or use mlp"
    )
  return pool


def check_output(
  args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
  """Makes the output directory, or ends the program with status 2.

  Args:
    args: what the parser returned.
    parser: the parser.
  """
  if message := _unwritable(args.output):
    parser.error(
      "argument --output: must be a directory that can be written to, got "
      f"{str(args.output)!r} ({message}). Choose another"
    )


def _describe(name: str) -> str:
  """The defaults of every data set and model, for a help text."""
  parts = []
  for dataset in ("mnist", "digits"):
    for model in ("mlp", "cnn"):
      recipe = recipes.recipe(dataset, model)
      values = ",".join(f"{k}={v:g}" for k, v in getattr(recipe, name).items())
      parts.append(f"{dataset} {model} {values} ({recipe.tuning_seeds} seeds)")
  return (
    f"{'; '.join(parts)}, all tuned on validation rows at label noise "
    f"{recipes.LABEL_NOISE:g} with sigma 1 and lmbda 0.9; an .npz those of "
    "mnist, not tuned"
  )


def _as_tuple(value: Any) -> tuple[float, ...]:
  return value if isinstance(value, tuple) else (value,)


def _unwritable(directory: pathlib.Path) -> Optional[str]:
  """Makes the directory; says why a file cannot be written there, or None."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return None
  except OSError as error:
    return os.strerror(error.errno) if error.errno else str(error)


def number(
  lower: float, upper: float, *, below: bool = False, remedy: str
) -> Callable[[str], float]:
  """Parses a number in `[lower, upper]`, without `upper` if `below`."""
  if upper == math.inf:
    what = f"a finite number, {lower:g} or more"
  else:
    what = f"a number in [{lower:g}, {upper:g}{')' if below else ']'}"

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    in_range = lower <= value < upper or (
      value == upper and not below and upper < math.inf
    )
    if not in_range:
      raise argparse.ArgumentTypeError(
        f"must be {what}, got {text!r}; {remedy}"
      )
    return value

  return parse


def integer(lower: int, upper: int, *, remedy: str) -> Callable[[str], int]:
  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = lower - 1
    if not lower <= value <= upper:
      raise argparse.ArgumentTypeError(
        f"must be an integer from {lower} to {upper}, got {text!r}; {remedy}"
      )
    return value

  return parse


def _optimizers(text: str) -> tuple[str, ...]:
  names = tuple(text.split(","))
  known = set(training.OPTIMIZERS)
  if set(names) - known or len(set(names)) < len(names):
    raise argparse.ArgumentTypeError(
      "must be one or more of sgd, sam and fsam with commas between, each "
      f"once, got {text!r}; for example sam,fsam"
    )
  return names


def _per_optimizer(
  name: str, is_grid: bool
) -> Callable[[str], dict[str, tuple[float, ...]]]:
  """Parses `0.1` to `{"": (0.1,)}` and `sam=0.1,fsam=0.2` to one for each."""
  known = ("sam", "fsam") if name == "rho" else training.OPTIMIZERS
  example = f"0.1 or {known[0]}=0.1,fsam=0.2"
  if is_grid:
    example += f" or {known[0]}=0.1:0.2:0.4"

  def values(text: str) -> tuple[float, ...]:
    parse = number(0, math.inf, remedy=f"write {example}")
    parsed = tuple(parse(part) for part in text.split(":"))
    if name == "learning_rate" and 0 in parsed:
      raise argparse.ArgumentTypeError(
        f"must be positive, got {text!r}; at 0 nothing is learnt"
      )
    if max(parsed) > float(np.finfo(np.float32).max):
      raise argparse.ArgumentTypeError(
        f"must be finite in float32, got {text!r}; write {example}"
      )
    if len(parsed) > 1 and not is_grid:
      raise argparse.ArgumentTypeError(
        f"must be one value for each optimizer, got {text!r}; `tune` takes "
        "grids"
      )
    return tuple(sorted(set(parsed)))

  def parse(text: str) -> dict[str, tuple[float, ...]]:
    if "=" not in text:
      return {"": values(text)}
    result = {}
    for part in text.split(","):
      optimizer, _, value = part.partition("=")
      if optimizer not in known or optimizer in result:
        raise argparse.ArgumentTypeError(
          f"must be one value or one for each of {', '.join(known)}, got "
          f"{text!r}; write {example}"
        )
      result[optimizer] = values(value)
    return result

  return parse

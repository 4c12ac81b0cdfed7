"""What a command will do: its flags and a recipe, checked before any work."""

import pathlib
import sys
from typing import Any, NamedTuple, Optional, Protocol

import jax

from fsam_optax.experiments import data as data_lib
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.common.values import PerOptimizer
from fsam_optax.experiments.seeds import one_run
from fsam_optax.experiments.seeds import recipes
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import shared_flags
from fsam_optax.experiments.seeds import splits
from fsam_optax.experiments.seeds import trainer


class Flags(Protocol):
  """The settings that ``compare`` and ``tune`` share."""

  @property
  def data(self) -> shared_flags.Data: ...
  @property
  def training(self) -> shared_flags.Training: ...
  @property
  def learning_rate(self) -> PerOptimizer: ...
  @property
  def rho(self) -> PerOptimizer: ...
  @property
  def weight_decay(self) -> PerOptimizer: ...
  @property
  def seeds(self) -> Optional[int]: ...
  @property
  def first_seed(self) -> int: ...


class Plan(NamedTuple):
  """What a command works with.

  Attributes:
    pool: the data set.
    data: what the flags say of it, of the network and of the noise.
    optimizers: in the order in which they run.
    grids: of each optimizer, of exactly one point in ``compare``.
    sigma: of F-SAM.
    lmbda: of F-SAM.
    seeds: consecutive integers.
    epochs: passes over the training rows.
    batch_size: rows a step.
    output: directory that exists and can be written to.
    origin: one line on where default hyperparameters come from.
  """

  pool: splits.Pool
  data: shared_flags.Data
  optimizers: tuple[str, ...]
  grids: dict[str, search.Grid]
  sigma: float
  lmbda: float
  seeds: range
  epochs: int
  batch_size: int
  output: pathlib.Path
  origin: str

  def make_trainer(self) -> trainer.Trainer:
    """The trainer of all optimizers."""
    return trainer.Trainer(
      networks.REGISTRY[self.data.model].create(self.pool.classes),
      self.pool,
      sigma=self.sigma,
      lmbda=self.lmbda,
      epochs=self.epochs,
      batch_size=self.batch_size,
    )

  def draw_splits(self) -> splits.Splits:
    """One split a seed."""
    return splits.split(
      self.pool, self.seeds, self.data.label_noise, self.data.label_noise_kind
    )

  def config(self) -> dict[str, Any]:
    """What the JSON says about how its numbers came to be."""
    return {
      **describe_data(self.pool, self.data),
      "optimizers": list(self.optimizers),
      "sigma": self.sigma,
      "lmbda": self.lmbda,
      "momentum": one_run.MOMENTUM,
      "learning_rate_schedule": "cosine to 0",
      "epochs": self.epochs,
      "batch_size": self.batch_size,
      "seeds": list(self.seeds),
      "accuracy_unit": "percent",
      "train_accuracy_labels": "as trained on, noise included",
      "versions": files.versions(),
      "device": jax.devices()[0].device_kind,
    }


def describe_data(pool: splits.Pool, data: shared_flags.Data) -> dict[str, Any]:
  """What the JSON of a command says of its data and network."""
  return {
    "dataset": pool.name,
    "model": data.model,
    "train_size": pool.train_size,
    "validation_size": pool.validation_size,
    "test_size": pool.test_size,
    "input_shape": list(pool.x.shape[1:]),
    "classes": pool.classes,
    "standardized_by": pool.standardized_by,
    "label_noise": data.label_noise,
    "label_noise_kind": data.label_noise_kind,
  }


def make(flags: Flags, *, is_grid: bool) -> Plan:
  """Turns flags into a plan.

  Args:
    flags: of the command.
    is_grid: whether several values stand for each hyperparameter.

  Returns:
    The plan, with the data loaded and the output directory made.

  Raises:
    FlagError: if the flags do not fit each other or the data.
  """
  recipe = recipe_of(flags.data)
  pool = load(flags.data)
  plan = Plan(
    pool=pool,
    data=flags.data,
    optimizers=flags.training.optimizers,
    grids=_grids(flags, recipe, is_grid),
    sigma=flags.training.sigma,
    lmbda=flags.training.lmbda,
    seeds=_seeds(flags, recipe.tuning_seeds if is_grid else recipe.seeds),
    epochs=flags.training.epochs or recipe.epochs,
    batch_size=_batch_size(flags.training.batch_size, recipe, pool),
    output=flags.training.output,
    origin=recipe.origin,
  )
  make_output(plan.output)
  return plan


def recipe_of(data: shared_flags.Data) -> recipes.Recipe:
  """The recipe of the data set and network of the flags."""
  return recipes.recipe(data.dataset, data.model, data.image_size)


def load(data: shared_flags.Data) -> splits.Pool:
  """Loads the data set of the flags, which the network of the flags can take.

  Args:
    data: of the flags.

  Returns:
    The data set.

  Raises:
    FlagError: if it cannot be read, or does not fit the network.
  """
  network = networks.REGISTRY[data.model]
  if network.has_statistics:
    others = [
      x.name for x in networks.REGISTRY.values() if not x.has_statistics
    ]
    raise FlagError(
      "--model",
      f"must be one of {', '.join(others)}, which keep no statistics of "
      f"batches, got {data.model!r}. `train` takes it",
    )
  try:
    pool = splits.load(data.dataset, recipe_of(data).image_size)
  except data_lib.DataError as error:
    raise FlagError("--dataset", error) from error
  for note in pool.notes:
    print(f"note: {note}", file=sys.stderr)
  shape = pool.x.shape[1:]
  if len(shape) == 1 and not network.takes_vectors:
    raise FlagError(
      "--model",
      f"{data.model} must have images, got rows of shape {list(shape)}. Store "
      "x_train and x_test as [n, height, width] or use mlp",
    )
  if len(shape) == 3 and min(shape[:2]) < network.least_image:
    raise FlagError(
      "--model",
      f"{data.model} must have images of {network.least_image} x "
      f"{network.least_image} pixels at least, got {shape[0]} x {shape[1]}",
    )
  return pool


def make_output(directory: pathlib.Path) -> None:
  """Makes the output directory, or raises a FlagError."""
  if message := files.make_directory(directory):
    raise FlagError("--output", message)


def _batch_size(
  given: Optional[int], recipe: recipes.Recipe, pool: splits.Pool
) -> int:
  if given is None:
    return min(recipe.batch_size, pool.train_size)
  if given > pool.train_size:
    raise FlagError(
      "--batch-size",
      f"must be at most the {pool.train_size} training rows, got {given}. "
      "Choose a smaller batch",
    )
  return given


def _seeds(flags: Flags, default: int) -> range:
  seeds = range(flags.first_seed, flags.first_seed + (flags.seeds or default))
  if seeds[-1] > shared_flags.LARGEST_SEED:
    raise FlagError(
      "--first-seed",
      f"must leave the last seed at {shared_flags.LARGEST_SEED} at most, got "
      f"{seeds[-1]}. Start lower",
    )
  return seeds


def _grids(
  flags: Flags, recipe: recipes.Recipe, is_grid: bool
) -> dict[str, search.Grid]:
  """The points of each optimizer that runs, by the flags or the recipe."""
  names = flags.training.optimizers
  given = {what: getattr(flags, what) for what in search.Grid._fields}
  for name, of in given.items():
    if unused := [n for n in of if n and n not in names]:
      raise FlagError(
        f"--{name.replace('_', '-')}",
        f"must name optimizers that run, got {unused[0]}, which --optimizers "
        "leaves out. Drop one or add the other",
      )
  grids = {}
  for name in names:
    default = recipe.grid(name) if is_grid else _alone(recipe.best[name])
    grid = default._replace(
      **{
        what: of.get(name, of.get("", getattr(default, what)))
        for what, of in given.items()
      }
    )
    has_radius = name in optimizers.ASCENDING
    grids[name] = grid if has_radius else grid._replace(rho=default.rho)
  return grids


def _alone(point: search.Point) -> search.Grid:
  return search.Grid(*((value,) for value in point))

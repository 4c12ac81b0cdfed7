"""What a command will do: its flags and a recipe, checked before any work."""

import pathlib
import sys
from typing import Any, NamedTuple, Optional, Protocol

import jax

from fsam_optax.experiments import datasets
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.common.values import PerOptimizer
from fsam_optax.experiments.seeds import one_run
from fsam_optax.experiments.seeds import recipes
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
  def seeds(self) -> Optional[int]: ...
  @property
  def first_seed(self) -> int: ...


class Plan(NamedTuple):
  """What a command works with.

  Attributes:
    pool: the data set.
    data: what the flags say of it, of the network and of the noise.
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

  pool: splits.Pool
  data: shared_flags.Data
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
      "weight_decay": one_run.WEIGHT_DECAY,
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
    is_grid: whether learning rates and radii are grids.

  Returns:
    The plan, with the data loaded and the output directory made.

  Raises:
    FlagError: if the flags do not fit each other or the data.
  """
  recipe = recipe_of(flags.data)
  pool = load(flags.data)
  values = _rates(flags, recipe, is_grid)
  plan = Plan(
    pool=pool,
    data=flags.data,
    optimizers=flags.training.optimizers,
    learning_rate=values["learning_rate"],
    rho=values["rho"],
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
  except datasets.DataError as error:
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


def _rates(
  flags: Flags, recipe: recipes.Recipe, is_grid: bool
) -> dict[str, dict[str, tuple[float, ...]]]:
  """Learning rates and radii of the optimizers that run."""
  defaults = {
    "learning_rate": recipe.learning_rate,
    "rho": recipe.rho,
  }
  if is_grid:
    defaults = {
      "learning_rate": recipe.learning_rate_grid,
      "rho": recipe.rho_grid,
    }
  optimizers = flags.training.optimizers
  found = {}
  for name, given in (
    ("learning_rate", flags.learning_rate),
    ("rho", flags.rho),
  ):
    if unused := [n for n in given if n and n not in optimizers]:
      raise FlagError(
        f"--{name.replace('_', '-')}",
        f"must name optimizers that run, got {unused[0]}, which --optimizers "
        "leaves out. Drop one or add the other",
      )
    found[name] = {
      optimizer: given.get(
        optimizer, given.get("", _as_tuple(defaults[name][optimizer]))
      )
      for optimizer in optimizers
      if optimizer in defaults[name]
    }
  return found


def _as_tuple(value: Any) -> tuple[float, ...]:
  return value if isinstance(value, tuple) else (value,)

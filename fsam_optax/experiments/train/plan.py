"""What would be run: whether the batches split, and what a step costs."""

import math
import time
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import batches
from fsam_optax.experiments.train import recipes
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.flags import Settings
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.program import Shapes


class Sizes(NamedTuple):
  """What a plan has to know of the images.

  Attributes:
    origin: their name.
    train: number of rows to train on, without those that are held out.
    evaluated: number of rows to evaluate on.
    image: height, width and channels.
    dtype: of the images.
    classes: number of classes.
  """

  origin: str
  train: int
  evaluated: int
  image: tuple[int, ...]
  dtype: Any
  classes: int


def sizes_of(
  recipe: str, config: Config, images: Optional[data.Images]
) -> Sizes:
  """The sizes of images, or, where they were not read, of the recipe's.

  Args:
    recipe: its name.
    config: the configuration.
    images: None where they were not read.

  Returns:
    The sizes.
  """
  held = config.images.validation
  if images is None:
    name = recipes.RECIPES[recipe].dataset
    known = data.REGISTRY[name].sizes
    assert known is not None
    origin, image, dtype = f"{name}, not read", known.image, np.dtype(np.uint8)
    train, test, classes = known.train, known.test, known.classes
  else:
    origin, image = images.name, images.x_train.shape[1:]
    dtype, classes = images.x_train.dtype, images.classes
    train, test = len(images.y_train), len(images.y_test)
  return Sizes(origin, train - held, held or test, image, dtype, classes)


def program_of(
  config: Config, sizes: Sizes, mesh: jax.sharding.Mesh
) -> Program:
  """The programs for these images, whose batches the devices divide.

  Args:
    config: the configuration; where the images were not read, mean and
      standard deviation are still open.
    sizes: of the images.
    mesh: the devices.

  Returns:
    The programs, not compiled.

  Raises:
    FlagError: if a batch does not split as the flags ask for.
  """
  order = batches.Order(
    sizes.train,
    config.descent.batch_size,
    drop_last=config.descent.drop_last,
    seed=0,
  )
  _check_batches(config, sizes, order, mesh.size)
  return Program(
    config,
    Shapes(
      sizes.image,
      sizes.dtype,
      sizes.classes,
      order.steps_an_epoch,
      order.last_size,
    ),
    mesh,
    mean=config.images.mean or 0.5,
    standard_deviation=config.images.standard_deviation or 0.25,
  )


def _check_batches(
  config: Config, sizes: Sizes, order: batches.Order, devices: int
) -> None:
  """Raises unless the rows make whole batches that the devices divide."""
  size, last = config.descent.batch_size, order.last_size
  if size > sizes.train:
    raise FlagError(
      "--batch-size",
      f"must be at most the {sizes.train} training rows, got {size}",
    )
  if size % devices:
    raise FlagError(
      "--batch-size",
      f"must split evenly over {devices} devices, got {size}",
    )
  if last % devices:
    raise FlagError(
      "--drop-last",
      f"must be given where the last {last} rows of an epoch do not split "
      f"evenly over {devices} devices",
    )
  _check_parts(config, size, devices)
  if last:
    remedy = " --drop-last leaves out the last rows of an epoch"
    _check_parts(config, last, devices, remedy)


def _check_parts(
  config: Config, rows: int, devices: int, remedy: str = ""
) -> None:
  """Raises unless a batch splits into parts, and those for the ascent."""
  # Of one device, where each takes a step by itself.
  rows //= devices if config.descent.sharding == "shard_map" else 1
  parts = config.descent.num_microbatches
  if rows % parts:
    raise FlagError(
      "--num-microbatches",
      f"must divide the {rows} rows of a batch, got {parts}.{remedy}",
    )
  if config.ascent.optimizer == "sgd":
    return
  rows //= parts
  fraction = config.ascent.ascent_fraction
  taken = fraction * rows
  if round(taken) < 1 or abs(round(taken) - taken) > 1e-6 * rows:
    low = math.floor(taken)
    nearest = [f"{k}/{rows}" for k in (low, low + 1) if 1 <= k <= rows]
    raise FlagError(
      "--ascent-fraction",
      f"must be a whole number of {rows} rows that go through at a time, got "
      f"{fraction:g}, {taken:g} rows. The nearest are "
      f"{' and '.join(nearest)}.{remedy}",
    )


def described(recipe: str, config: Config, fingerprint: str) -> dict[str, Any]:
  """All that the numbers depend on, by flag."""
  return {
    "--recipe": recipe,
    **config.by_flag(),
    "--data (SHA-256)": fingerprint,
  }


def bytes_of(tree: Any) -> int:
  """What the arrays of a tree take."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def text(settings: Settings, program: Program, sizes: Sizes) -> str:
  """What would be run, with XLA's count of its memory and cost.

  Args:
    settings: what the command line says.
    program: the programs, of which this compiles the step.
    sizes: of the images.

  Returns:
    A table, and all flags.
  """
  lines = {
    "recipe": f"{settings.recipe}, {program.config.ascent.optimizer}",
    **_lines(program, sizes),
    **_measured(program, settings),
    "seeds": f"{settings.run.first_seed} to "
    f"{settings.run.first_seed + settings.run.seeds - 1}",
  }
  fields = described(settings.recipe, program.config, "not computed")
  flags = " ".join(
    f"{name} {value}" for name, value in fields.items() if name != "--recipe"
  )
  width = max(map(len, lines))
  table = "\n".join(f"{k:{width}}  {v}" for k, v in lines.items())
  return f"{table}\n\n{flags}\n\nNothing was trained or written."


def _lines(program: Program, sizes: Sizes) -> dict[str, str]:
  """What is known before anything is compiled."""
  config, network = program.config, program.config.network
  parameters = sum(
    math.prod(x.shape) for x in jax.tree.leaves(program.abstract().state.params)
  )
  gradients = "1 gradient"
  if config.ascent.optimizer != "sgd":
    gradients = f"{1 + config.ascent.ascent_fraction:g} gradients"
  return {
    "images": f"{sizes.origin}: {sizes.train:,} to train on, "
    f"{sizes.evaluated:,} to evaluate on, of "
    f"{' x '.join(map(str, sizes.image))}, {sizes.classes} classes",
    "network": f"{network.model}, depth {network.depth}, width "
    f"{network.width}: {parameters:,} parameters, {network.dtype}",
    "steps": f"{program.shapes.steps_an_epoch:,} an epoch, {program.steps:,} "
    f"in {config.descent.epochs} epochs, {config.descent.batch_size} rows and "
    f"{gradients} a step",
    "learning rate": f"{config.descent.learning_rate:g}, by a cosine to 0",
    "devices": f"{program.mesh.size} of "
    f"{program.mesh.devices.flat[0].device_kind}, {config.descent.sharding}",
  }


def _measured(program: Program, settings: Settings) -> dict[str, str]:
  """What XLA counts in the compiled step."""
  config = program.config
  start = time.perf_counter()
  compiled = program.lower_step(config.descent.batch_size).compile()
  seconds = time.perf_counter() - start
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  mebi = lambda number: f"{number / 2**20:,.1f} MiB"
  whole = mebi(bytes_of(program.abstract()))
  flops = cost["flops"]
  total = flops * program.steps * program.mesh.size
  parts = config.descent.num_microbatches
  loop = f"; a loop's body is counted once, of {parts}" if parts > 1 else ""
  return {
    "checkpoint": f"{whole}, of which three are kept, in {settings.folder}",
    "memory": f"{mebi(memory.temp_size_in_bytes)} beside the state of {whole}, "
    "a device",
    "cost": f"{flops / 1e9:,.2f} GFLOP a step and device, "
    f"{total / 1e15:,.3g} PFLOP in all{loop}",
    "compiled in": f"{seconds:.0f} s",
  }

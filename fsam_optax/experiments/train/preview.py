"""What ``--dry-run`` prints: the plan, and what a step takes."""

import math
import shlex
from typing import Any

import jax

from fsam_optax.experiments import data
from fsam_optax.experiments.train.flags_and_recipes import Settings
from fsam_optax.experiments.train.program import Program


def text(settings: Settings, program: Program, images: data.Images) -> str:
  """A table of what would be run, with XLA's count of its memory and cost."""
  config = program.config
  descent, network = config.descent, config.network
  state = program.abstract()
  parameters = sum(x.size for x in jax.tree.leaves(state.state.params))
  compiled = program.lower_step().compile()
  mebi = lambda number: f"{number / 2**20:,.1f} MiB"
  temporary = compiled.memory_analysis().temp_size_in_bytes
  size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
  whole = mebi(sum(map(size, jax.tree.leaves(state))))
  # Not every compiler of a GPU counts them.
  flops = (compiled.cost_analysis() or {}).get("flops", math.nan)
  total = flops * program.steps * program.mesh.size
  parts = descent.num_microbatches
  loop = f"; a loop's body is counted once, of {parts}" if parts > 1 else ""
  held_out = config.images.validation
  lines = {
    "images": f"{images.name}{'' if settings.data else ', not read'}: "
    f"{len(images.y_train) - held_out:,} to train on, "
    f"{held_out or len(images.y_test):,} to evaluate on, of "
    f"{' x '.join(map(str, program.image))}, {images.classes} classes",
    "network": f"{network.model}, depth {network.depth}, width "
    f"{network.width}: {parameters:,} parameters, {network.dtype}",
    "steps": f"{program.steps_an_epoch:,} an epoch, {program.steps:,} in "
    f"{descent.epochs} epochs, {descent.batch_size} rows a step",
    "devices": f"{program.mesh.size} of "
    f"{program.mesh.devices.flat[0].device_kind}, {descent.sharding}",
    "memory": f"{mebi(temporary)} beside the state of {whole}, a device",
    "cost": f"{flops / 1e9:,.2f} GFLOP a step and device, "
    f"{total / 1e15:,.3g} PFLOP in all{loop}",
  }
  width = max(map(len, lines))
  table = "\n".join(f"{k:{width}}  {v}" for k, v in lines.items())
  shown = {"--recipe": config.recipe, **config.by_flag()}
  if not settings.data:  # Nothing was read to measure these on.
    given = settings.by_flag()
    for flag in ("--mean", "--standard-deviation"):
      if not given[flag]:
        del shown[flag]
  words = [word for flag in shown.items() for word in _words(*flag)]
  return f"{table}\n\n{shlex.join(words)}\n\nNothing was trained or written."


def _words(flag: str, value: Any) -> list[str]:
  """A flag as it is given on the command line; none where it is left out."""
  if value is None:
    return []
  if isinstance(value, bool):
    return [flag if value else flag.replace("--", "--no-", 1)]
  values = value if isinstance(value, tuple) else (value,)
  return [flag, *map(str, values)]

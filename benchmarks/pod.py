"""The cost of a step on many TPUs or GPUs, by the compiler's own count.

Compiles the data-parallel train step for devices that need not be present, and
prints a row for each mode: the communication, how much of it is between the two
passes, and what each device computes and keeps. Each device has the same number
of rows (weak scaling). ``h100:4x8`` means four hosts with eight GPUs each:

  python3 -m venv .pod && .pod/bin/pip install -q -e ".[pod]"
  .pod/bin/python benchmarks/pod.py [--topologies v5e:16x16 h100:4x8]
                                    [--model resnet18] [--modes ...]
                                    [--output pods.jsonl]

With the flags of ``python -m fsam_optax train`` it compiles the step of that
command, with its augmentation, for the number of chips that share the batch:

  .pod/bin/python benchmarks/pod.py --train "--optimizer fsam" --chips 1
"""

import argparse
from collections.abc import Iterable
import functools
import json
import math
import shlex
import time
from typing import Any, Callable, NamedTuple, Optional

import absent_device  # Before JAX, which would look for a chip.

# isort: split
import hlo
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import steps
import workloads

import fsam_optax
from fsam_optax.experiments.common import flags as flags_lib
from fsam_optax.experiments.train import flags_and_recipes
from fsam_optax.experiments.train import image_rows
from fsam_optax.experiments.train import program

LEAN = {"sync_perturbation": False, "ema_gradient": "descent"}
MEBI = 2**20


class Mode(NamedTuple):
  """How a step is compiled: with a named axis, by jit, or by jit and FSDP."""

  how: str
  is_fsam: bool
  options: dict[str, Any]


MODES = {
  "SGD": Mode("axis", False, {}),
  "default": Mode("axis", True, {}),
  "local": Mode("axis", True, {"sync_perturbation": False}),
  "average-of-descent": Mode("axis", True, {"ema_gradient": "descent"}),
  "lean": Mode("axis", True, LEAN),
  "ascent-fraction": Mode("axis", True, {"ascent_fraction": 0.25}),
  "micro-batches": Mode("axis", True, {"num_microbatches": 4}),
  "jit-SGD": Mode("jit", False, {}),
  "jit": Mode("jit", True, {}),
  "jit-micro-batches": Mode("jit", True, {"num_microbatches": 4}),
  "fsdp-SGD": Mode("fsdp", False, {}),
  "fsdp": Mode("fsdp", True, {}),
}


MODELS = {  # The model, and the number of rows for each chip.
  "resnet18": (workloads.residual, 128),
  "transformer": (workloads.decoder, 16),
  "perceptron-narrow": (functools.partial(workloads.mlp, (256,) * 3), 16),
  "transformer-narrow": (
    functools.partial(
      workloads.decoder,
      **{"vocabulary": 512, "length": 64, "width": 128, "depth": 1, "heads": 4},
    ),
    16,
  ),
}


def mode_row(model: str, mode: str, topology: str) -> dict[str, Any]:
  """A row of the table: one mode, compiled for one topology."""
  how, is_fsam, options = MODES[mode]
  devices = absent_device.devices(topology)
  mesh = Mesh(devices, ("batch",))
  if how == "fsdp":  # Two axes, to split two dimensions.
    side = 2 ** (devices.size.bit_length() // 2)
    mesh = Mesh(devices.reshape(side, -1), ("batch", "more"))
  make_workload, rows_a_chip = MODELS[model]
  workload = make_workload()
  step = steps.train_step(
    workload.loss_fn,
    fsam_optax.friendly_perturbation() if is_fsam else None,
    axis_name="batch" if how == "axis" else None,
    **options,
  )
  state = jax.eval_shape(step.init, *workload.shapes()[:2])
  rule = None
  if how == "fsdp":
    rule = fsam_optax.sharding.fsdp_rule(mesh, mesh.axis_names)
  state = program.abstract(state, mesh, rule)
  by_rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (rows_a_chip * mesh.size, *x.shape[1:]), x.dtype, sharding=by_rows
    ),
    workload.batch(1),
  )
  if how == "axis":
    update = fsam_optax.sharding.shard_map_step(step.update, mesh)
  else:
    shardings = jax.tree.map(lambda x: x.sharding, state)
    update = jax.jit(
      step.update, donate_argnums=0, out_shardings=(shardings, None)
    )
  compiled = update.lower(state, batch).compile()
  names = {"model": model, "mode": mode, "topology": topology}
  return names | counts_of(compiled, state, devices)


def train_row(
  flags: str, topology: str, chips: Optional[int]
) -> dict[str, Any]:
  """A row of the table: the step of ``train`` on some chips of a topology."""
  settings = flags_lib.parse(
    flags_and_recipes.Settings,
    ["--dry-run", *shlex.split(flags)],
    program="--train",
    description="The flags of train.",
  )
  images, config = image_rows.load(settings)
  devices = absent_device.devices(topology)[:chips]
  built = program.Program(config, images, Mesh(devices, ("batch",)))
  names = {
    "model": f"{settings.recipe}, {config.network.dtype}",
    "mode": config.ascent.optimizer,
    "flags": flags,
    "topology": f"{devices.size} of {topology}",
  }
  compiled = built.lower_step().compile()
  return names | counts_of(compiled, built.abstract().state, devices)


def counts_of(
  compiled: jax.stages.Compiled, state: Any, devices: np.ndarray
) -> dict[str, Any]:
  """The counts of the compiler for a step."""
  text = compiled.as_text()
  found = hlo.collectives(text)
  shapes = [x.shape for x in jax.tree.leaves(state.params)]
  parameters = sum(map(math.prod, shapes))
  words = lambda chosen: sum(c.words for c in chosen) / parameters
  between = [c for c in found if c.is_between]
  by_kind = {c.kind: [x for x in found if x.kind == c.kind] for c in found}
  # The compiler for GPUs counts neither operations nor bytes.
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return {
    "parameters": parameters,
    "parameter_shapes": sorted(set(shapes)),
    "chips": devices.size,
    "chip": devices[0].device_kind,
    "words": {kind: words(own) for kind, own in by_kind.items()},
    "collectives": sum(c.count for c in found),
    "between": sum(c.count for c in between),
    "words_between": words(between),
    "shapes": {
      kind: sorted({shape for c in own for shape in c.shapes})
      for kind, own in by_kind.items()
      if kind != "all-reduce"
    },
    "flops": cost.get("flops"),
    "bytes": cost.get("bytes accessed", hlo.main_memory_bytes(text)),
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "state_bytes": sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(state)
    ),
    "versions": {"jax": jax.__version__},
  }


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
  "model": lambda row: row["model"],
  "mode": lambda row: row["mode"],
  "topology": lambda row: row["topology"],
  "words": lambda row: ", ".join(
    f"{words:.2f} by {kind}" for kind, words in row["words"].items()
  ),
  "collectives": lambda row: str(row["collectives"]),
  "between passes": lambda row: str(row["between"]),
  "words between": lambda row: f"{row['words_between']:.2f}",
  "GFLOP": lambda row: "" if not row["flops"] else f"{row['flops'] / 1e9:.2f}",
  "MiB accessed": lambda row: f"{row['bytes'] / MEBI:.1f}",
  "MiB temporary": lambda row: f"{row['temporary_bytes'] / MEBI:.2f}",
  "MiB of state": lambda row: f"{row['state_bytes'] / MEBI:.2f}",
}


def line_of(cells: Iterable[str]) -> str:
  """One line of the table."""
  return "| " + " | ".join(cells) + " |"


def main():
  """Prints the table as the programs are compiled."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--model",
    choices=MODELS,
    default="transformer",
    help="resnet18 takes minutes a mode",
  )
  add(
    "--topologies",
    nargs="+",
    default=["v5e:16x16"],
    help="such as v5e:2x2, v5e:16x16, v4:2x2x2, v5p:4x4x4 or h100:4x8",
  )
  add(
    "--modes",
    nargs="+",
    choices=MODES,
    default=list(MODES),
    metavar="MODE",
    help=", ".join(MODES),
  )
  add("--output", help="append each row to this JSON Lines file")
  add(
    "--train",
    metavar="FLAGS",
    nargs="+",
    help="instead: the step of `python -m fsam_optax train FLAGS`, a row for "
    "each argument",
  )
  add("--chips", type=int, help="use the first so many for --train")
  args = parser.parse_args()
  # Words are for each parameter, the rest for each chip.
  print(line_of(COLUMNS))
  print("|" + "---|" * len(COLUMNS), flush=True)
  for topology in args.topologies:
    for what in args.train or args.modes:
      start = time.perf_counter()
      if args.train:
        row = train_row(what, topology, args.chips)
      else:
        row = mode_row(args.model, what, topology)
      row["seconds"] = time.perf_counter() - start
      print(line_of(cell(row) for cell in COLUMNS.values()), flush=True)
      if args.output:
        with open(args.output, "a") as file:
          file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
  main()

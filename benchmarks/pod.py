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
import functools
import json
import math
import shlex
import time
from typing import Any, NamedTuple, Optional

import absent_device  # Before JAX, which would look for a chip.

# isort: split
import hlo
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import steps
import workloads

import fsam_optax
from fsam_optax.experiments.common import flags as flags_lib
from fsam_optax.experiments.train import program
from fsam_optax.experiments.train import rows
from fsam_optax.experiments.train import settings as train_settings

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
  "transformer-narrow": (
    functools.partial(
      workloads.decoder,
      **{"vocabulary": 512, "length": 64, "width": 128, "depth": 1, "heads": 4},
    ),
    16,
  ),
}


def compile_step(model: str, mode: Mode, mesh: Mesh) -> tuple[Any, Any]:
  """The compiled step, and the shapes of the state that it was compiled for."""
  make_workload, rows_a_chip = MODELS[model]
  workload = make_workload()

  def create():
    params, model_state = workload.init(jax.random.key(0))
    return fsam_optax.TrainState.create(
      apply_fn=None,
      params=params,
      tx=optax.sgd(0.1, momentum=0.9),
      perturbation=(
        fsam_optax.friendly_perturbation() if mode.is_fsam else None
      ),
      model_state=model_state,
    )

  state = jax.eval_shape(create)
  rule = lambda path, leaf: PartitionSpec()
  if mode.how == "fsdp":
    rule = fsam_optax.sharding.fsdp_rule(mesh, mesh.axis_names)

  def sharding_of(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, rule(name, leaf))

  state = absent_device.place(
    state, jax.tree_util.tree_map_with_path(sharding_of, state)
  )
  rows = rows_a_chip * mesh.size
  by_rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  batch = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (rows, *x.shape[1:]), x.dtype, sharding=by_rows
    ),
    workload.make_batch(np.random.default_rng(0), 1),
  )
  step = fsam_optax.make_train_step(
    steps.reporting_nothing(workload.loss_fn),
    jit=False,
    axis_name="batch" if mode.how == "axis" else None,
    **mode.options,
  )
  if mode.how == "axis":
    step = fsam_optax.sharding.shard_map_step(step, mesh)
  else:
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
  return step.lower(state, batch).compile(), state


def row_of(
  model_name: str, mode_name: str, topology: str, text_file: Optional[str]
) -> dict[str, Any]:
  """A row of the table: one mode, compiled for one topology."""
  start = time.perf_counter()
  devices = absent_device.devices(topology)
  mesh = Mesh(devices, ("batch",))
  if MODES[mode_name].how == "fsdp":  # Two axes, to split two dimensions.
    rows = 2 ** (devices.size.bit_length() // 2)
    mesh = Mesh(devices.reshape(rows, -1), ("batch", "more"))
  compiled, state = compile_step(model_name, MODES[mode_name], mesh)
  names = {"model": model_name, "mode": mode_name, "topology": topology}
  row = counts_of(compiled, state, devices, text_file)
  return {**names, **row, "seconds": time.perf_counter() - start}


def train_row(
  flags: str, topology: str, chips: Optional[int], text_file: Optional[str]
) -> dict[str, Any]:
  """A row of the table: the step of ``train`` on some chips of a topology."""
  start = time.perf_counter()
  settings = flags_lib.parse(
    train_settings.Settings,
    shlex.split(flags),
    program="--train",
    description="The flags of train.",
  )
  images, config = rows.unread(settings)
  devices = absent_device.devices(topology)[:chips]
  built = program.Program(config, images, Mesh(devices, ("batch",)))
  compiled = built.lower_step().compile()
  names = {
    "model": f"{settings.recipe}, {config.network.dtype}",
    "mode": config.ascent.optimizer,
    "flags": flags,
    "topology": f"{devices.size} of {topology}",
  }
  row = counts_of(compiled, built.abstract().state, devices, text_file)
  return {**names, **row, "seconds": time.perf_counter() - start}


def counts_of(
  compiled: Any, state: Any, devices: np.ndarray, text_file: Optional[str]
) -> dict[str, Any]:
  """The counts of the compiler for a step."""
  text = compiled.as_text()
  if text_file:
    with open(text_file, "w") as file:
      file.write(text)
  found = hlo.collectives(text)
  sizes = [math.prod(x.shape) for x in jax.tree.leaves(state.params)]
  words = lambda chosen: sum(c.words for c in chosen) / sum(sizes)
  between = [c for c in found if c.is_between]
  moved = {c.kind for c in found}
  # The compiler for GPUs counts neither operations nor bytes.
  cost = compiled.cost_analysis() or {}
  memory = compiled.memory_analysis()
  return {
    "parameters": sum(sizes),
    "parameter_shapes": sorted(
      {x.shape for x in jax.tree.leaves(state.params)}
    ),
    "chips": devices.size,
    "chip": devices[0].device_kind,
    "words": {
      kind: words([c for c in found if c.kind == kind]) for kind in moved
    },
    "collectives": sum(c.count for c in found),
    "between": sum(c.count for c in between),
    "words_between": words(between),
    "shapes": {
      kind: sorted({s for c in found if c.kind == kind for s in c.shapes})
      for kind in moved - {"all-reduce"}
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


COLUMNS = (
  "model",
  "mode",
  "topology",
  "all-reduced",
  "gathered or scattered",
  "collectives",
  "between passes",
  "GFLOP",
  "MiB accessed",
  "MiB temporary",
  "MiB of state",
)


def line_of(row: dict[str, Any]) -> str:
  """One line of the table. Words are for each parameter, the rest per chip."""
  others = sum(n for kind, n in row["words"].items() if kind != "all-reduce")
  between = f"{row['between']}"
  if row["between"]:
    between += f" ({row['words_between']:.2f})"
  cells = (
    row["model"],
    row["mode"],
    row["topology"],
    f"{row['words'].get('all-reduce', 0):.2f}",
    f"{others:.2f}" if others else "0",
    str(row["collectives"]),
    between,
    "" if row["flops"] is None else f"{row['flops'] / 1e9:.2f}",
    f"{row['bytes'] / MEBI:.1f}",
    f"{row['temporary_bytes'] / MEBI:.2f}",
    f"{row['state_bytes'] / MEBI:.2f}",
  )
  return "| " + " | ".join(cells) + " |"


def main():
  """Prints the table as the programs are compiled."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--model",
    choices=MODELS,
    default="transformer",
    help="resnet18 takes minutes a mode",
  )
  parser.add_argument(
    "--topologies",
    nargs="+",
    default=["v5e:16x16"],
    help="such as v5e:2x2, v5e:16x16, v4:2x2x2, v5p:4x4x4 or h100:4x8",
  )
  parser.add_argument(
    "--modes",
    nargs="+",
    choices=MODES,
    default=list(MODES),
    metavar="MODE",
    help=", ".join(MODES),
  )
  parser.add_argument(
    "--output", help="append each row to this JSON Lines file"
  )
  parser.add_argument("--text", help="also write the last program to this file")
  parser.add_argument(
    "--train",
    metavar="FLAGS",
    nargs="+",
    help="instead: the step of `python -m fsam_optax train FLAGS`, a row for "
    "each argument",
  )
  parser.add_argument(
    "--chips", type=int, help="use the first so many for --train"
  )
  args = parser.parse_args()
  print("| " + " | ".join(COLUMNS) + " |")
  print("|" + "---|" * len(COLUMNS), flush=True)
  for topology in args.topologies:
    for what in args.train or args.modes:
      if args.train:
        row = train_row(what, topology, args.chips, args.text)
      else:
        row = row_of(args.model, what, topology, args.text)
      print(line_of(row), flush=True)
      if args.output:
        with open(args.output, "a") as file:
          file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
  main()

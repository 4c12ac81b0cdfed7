"""The cost of a step of F-SAM, beside its floor and its peers.

The floor is two dependent gradients and one optimizer update, without a norm or
a moving average. No sharpness-aware step can cost less. XLA counts the bytes
that the compiled step reads and writes, and the temporary memory that it
allocates; both are printed in words (4 bytes) for each parameter. Times are
medians over rounds of all steps in turn. Their ratios are to the floor and to
SGD in the same round.

  python benchmarks/step_cost.py [--models mlp] [--batch-sizes 8 256]
                                 [--steps floor "train step (default)"]
                                 [--rounds 40] [--output step_cost.json]

With ``--peers``, the same models in PyTorch by pytorch_optimizer run in the
same rounds, as ratios to PyTorch's SGD:

  pip install torch pytorch_optimizer
  python benchmarks/step_cost.py --peers --models mlp cnn transformer

With ``--tpu`` or ``--gpu`` it prints the counts alone, of the program for one
TPU v5e or one H100, which need not be present. It adds the words moved to and
from the main memory (XLA counts a copy into the fast memory of a TPU three
times, and nothing on a GPU), and the time over SGD's that the device's
bandwidth and throughput predict. A row takes seconds, for ResNet-18 minutes:

  pip install -e ".[pod]"
  python benchmarks/step_cost.py --gpu [--models perceptron decoder resnet18]
"""

import argparse
from collections.abc import Collection
from collections.abc import Iterable
import importlib
import json
import os
import platform
import sys
import time
from typing import Any, Callable, NamedTuple, Optional

if {"--tpu", "--gpu"} & set(sys.argv):
  import absent_device  # Before JAX, which would look for a device.

import hlo
import jax
from jax import numpy as jnp
import numpy as np
import optax
import steps as steps_lib
import workloads

PEERED = (  # The steps to compare with PyTorch.
  "SGD",
  "floor",
  "optax.contrib.sam",
  "optax.contrib.sam, transparent",
  "fsam in a chain",
  "train step (default)",
  "train step, 1/8",
)
DEFAULTS = {  # Models and batch sizes, on this machine and for an absent one.
  False: (["mlp"], [8, 256]),
  True: (["perceptron", "decoder", "resnet18"], [128]),
}
RATIOS = {  # Of the times, by the step that they are ratios to.
  "SGD": "ratio_to_sgd",
  "torch SGD": "ratio_to_sgd",
  "floor": "ratio_to_floor",
}
TOPOLOGIES = {"tpu": "v5e:2x2", "gpu": "h100:1x1"}


class Peak(NamedTuple):
  """The peak of a device in a second, as its maker gives it."""

  main_memory_bytes: float
  flops: float  # Products of float32 in JAX's default, TF32 on a GPU.
  narrow_flops: float  # Products of bfloat16.
  exact_flops: Optional[float] = None  # Products in full float32.


PEAKS = {  # By the beginning of the device's name.
  "NVIDIA H100": Peak(3.35e12, 495e12, 989e12, 67e12),
  "NVIDIA H200": Peak(4.8e12, 495e12, 989e12, 67e12),
  "NVIDIA A100": Peak(2.04e12, 156e12, 312e12, 19.5e12),
  "TPU v5 lite": Peak(0.819e12, 197e12, 197e12),
}


def chosen_steps(
  workload: workloads.Workload, batch_size: int, names: Collection[str]
) -> dict[str, steps_lib.Step]:
  """The steps of these names, or all, whose parts divide the batch."""
  return {
    name: step
    for name, step in steps_lib.steps(workload.loss_fn).items()
    if (not names or name in names)
    and not ("1/8" in name and batch_size % 8)
    and not ("4 " in name and batch_size % 4)
  }


def compile_step(
  step: steps_lib.Step, state: Any, batch: Any
) -> jax.stages.Compiled:
  """Compiles a step, with its state donated."""
  update = jax.jit(step.update, donate_argnums=0)
  return update.lower(state, batch).compile()


def counted(
  step: steps_lib.Step, state: Any, batch: Any, num_params: int
) -> tuple[dict[str, Any], jax.stages.Compiled]:
  """A row with the compiler's counts, and the compiled step."""
  start = time.perf_counter()
  compiled = compile_step(step, state, batch)
  seconds = time.perf_counter() - start
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  row = {"parameters": num_params, **counts(compiled, num_params)}
  row["state_words"] = size / (4 * num_params)
  return {**row, "compile_seconds": seconds}, compiled


def counts(compiled: jax.stages.Compiled, num_params: int) -> dict[str, Any]:
  """The compiler's counts of a step, None for those that it does not give."""
  cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
  words = lambda size: None if size is None else size / (4 * num_params)
  return {
    "words": words(cost.get("bytes accessed")),
    "main_memory_words": words(hlo.main_memory_bytes(compiled.as_text())),
    "temporary_words": words(getattr(memory, "temp_size_in_bytes", None)),
    "flops": cost.get("flops"),
  }


def above_floor(rows: list[dict[str, Any]]) -> None:
  """Adds to each row the difference of its counts from the floor's."""
  floor = next((row for row in rows if row["step"] == "floor"), {})
  for row in rows:
    for name, above in (
      ("words", "words_above_floor"),
      ("main_memory_words", "main_memory_above_floor"),
      ("temporary_words", "temporary_above_floor"),
    ):
      if row.get(name) is not None and floor.get(name) is not None:
        row[above] = row[name] - floor[name]


def predict(rows: list[dict[str, Any]], device: str) -> None:
  """Adds to each row the ratio to SGD's time that a roofline predicts.

  The rows are of one model and batch size, with SGD's among them. A step takes
  the time of its operations or of its bytes at the device's peak, whichever is
  longer. The ratio is also added for full float32, where that has another peak.
  Nothing is added for a device whose peak is not known.
  """
  peak = next((x for name, x in PEAKS.items() if device.startswith(name)), None)
  if peak is None:
    return
  if "bfloat16" in rows[0]["model"]:
    peaks = {"to_sgd": peak.narrow_flops}
  else:
    peaks = {"to_sgd": peak.flops, "in_float32": peak.exact_flops}
  for name, flops in peaks.items():
    seconds = {}
    for row in rows:
      words, own_flops = row.get("main_memory_words"), row.get("flops")
      if None not in (flops, words, own_flops):
        by_bytes = 4 * row["parameters"] * words / peak.main_memory_bytes
        seconds[row["step"]] = max(by_bytes, own_flops / flops)
    for row in rows:
      if {"SGD", row["step"]} <= seconds.keys():
        ratio = seconds[row["step"]] / seconds["SGD"]
        row[f"predicted_ratio_{name}"] = ratio


def first_state(workload: workloads.Workload, step: steps_lib.Step) -> Any:
  """A step's first state, in buffers of its own, to be donated."""
  state = step.init(*jax.jit(workload.init)(jax.random.key(0)))
  # The state of optax.contrib.sam holds the parameters twice.
  return jax.tree.map(jnp.copy, state)


def count_for(chip: Any, model: str, batch_size: int, names: Collection[str]):
  """Yields a row of counts for each step, compiled for an absent device."""
  workload = workloads.WORKLOADS[model]()
  sharding = jax.sharding.SingleDeviceSharding(chip)
  on_chip = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  params, model_state, num_params = workload.shapes()
  batch = workload.batch(batch_size)
  setting = {"model": model, "batch_size": batch_size}
  rows = []
  for name, step in chosen_steps(workload, batch_size, names).items():
    state = jax.eval_shape(step.init, params, model_state)
    row, _ = counted(step, *jax.tree.map(on_chip, (state, batch)), num_params)
    if row["flops"] is None:  # The compiler for GPUs counts none.
      lowered = jax.jit(step.update).lower(state, batch)
      row["flops"] = lowered.cost_analysis()["flops"]
    rows.append({**setting, "step": name, **row})
    above_floor(rows)
    predict(rows, chip.device_kind)
    yield rows[-1]


def measure(
  workload: workloads.Workload,
  batch_size: int,
  rounds: int,
  names: Collection[str] = (),
  others: dict[str, Callable[[int], Any]] | None = None,
) -> list[dict[str, Any]]:
  """Compiles the steps of some names, or all, and times them: a row of each.

  All take turns for so many rounds; the rows of the others have times alone.
  """
  batch, num_params = workload.batch(batch_size), workload.shapes()[-1]
  calls, rows = {}, []
  for name, step in chosen_steps(workload, batch_size, names).items():
    state = first_state(workload, step)
    row, compiled = counted(step, state, batch, num_params)
    rows.append({"step": name, "batch_size": batch_size, **row})
    calls[name] = repeated(compiled, state, batch)
  above_floor(rows)
  others = others or {}
  rows += [{"step": name, "batch_size": batch_size} for name in others]
  times = time_calls({**calls, **others}, rounds)
  for row in rows:
    among = others if row["step"] in others else calls
    row |= times_of(row["step"], {name: times[name] for name in among})
  return rows


def repeated(
  compiled: jax.stages.Compiled, state: Any, batch: Any
) -> Callable[[int], None]:
  """A function that takes a number of steps, and waits for the last.

  It goes on from its own last state; the first one is donated.
  """

  def take(steps):
    nonlocal state
    for _ in range(steps):
      state, reported = compiled(state, batch)
    jax.block_until_ready((state, reported))

  return take


def time_calls(
  calls: dict[str, Callable[[int], Any]],
  rounds: int | None = None,
  seconds: float = 1.0,
) -> dict[str, np.ndarray]:
  """The seconds of a step, by name, an element for each round of all in turn.

  Args:
    calls: by name, functions that take a number of steps and wait for the last.
    rounds: None for as many as fit in `seconds`, from 5 to 30.
    seconds: for all rounds together, about.
  """

  def time_of(call, repeats):
    start = time.perf_counter()
    call(repeats)
    return (time.perf_counter() - start) / repeats

  for call in calls.values():  # Warms up.
    call(2)
  guess = {name: time_of(call, 2) for name, call in calls.items()}
  # Enough steps at a time for the clock not to see their launch.
  repeats = {name: int(np.clip(0.02 / guess[name], 1, 50)) for name in calls}
  if rounds is None:
    a_round = sum(guess[name] * repeats[name] for name in calls)
    rounds = int(np.clip(seconds / a_round, 5, 30))
  found: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds):
    for name, call in calls.items():
      found[name].append(time_of(call, repeats[name]))
  return {name: np.array(x) for name, x in found.items()}


def times_of(name: str, times: dict[str, np.ndarray]) -> dict[str, float]:
  """The median time of a step, and of its ratios to SGD and to the floor."""
  own = times[name]
  found = {"milliseconds": float(np.median(own)) * 1e3}
  for other, ratio in RATIOS.items():
    if other in times:
      found[ratio] = float(np.median(own / times[other]))
  return found


class Column(NamedTuple):
  """A column of the table: its heading, width, field of a row and format."""

  heading: str
  width: int
  field: str
  form: str


COUNTED = (
  Column("words", 7, "words", ".2f"),
  Column("above", 7, "words_above_floor", ".2f"),
  Column("trees", 6, "temporary_words", ".2f"),
  Column("above", 6, "temporary_above_floor", ".2f"),
)
TIMED = (
  Column("ms", 8, "milliseconds", ".2f"),
  Column("/floor", 6, "ratio_to_floor", ".3f"),
  Column("/SGD", 6, "ratio_to_sgd", ".3f"),
)
COMPILED = (
  Column("main", 6, "main_memory_words", ".2f"),
  Column("above", 6, "main_memory_above_floor", ".2f"),
  Column("predicted /SGD", 14, "predicted_ratio_to_sgd", ".2f"),
  Column("compile s", 9, "compile_seconds", ".1f"),
)


def line_of(row: dict[str, Any], columns: Iterable[Column]) -> str:
  """A line of the table, blank where the row has no number."""
  line = f"{row['model']:20} {row['batch_size']:5} {row['step']:40}"
  for _, width, field, form in columns:
    value = row.get(field)
    line += f" {'' if value is None else format(value, form):>{width}}"
  return line.rstrip()


def heading(columns: Iterable[Column]) -> str:
  """The first line of the table."""
  line = f"{'model':20} {'batch':>5} {'step':40}"
  return line + "".join(f" {x.heading:>{x.width}}" for x in columns)


def parse() -> argparse.Namespace:
  """The command line, with the defaults of the device filled in."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  add = parser.add_argument
  add("--models", nargs="+", choices=workloads.WORKLOADS, metavar="MODEL")
  add("--batch-sizes", type=int, nargs="+", metavar="ROWS")
  add("--steps", nargs="+", default=[], metavar="NAME", help="default all")
  add("--rounds", type=int, default=40, help="interleaved timings of each step")
  for kind in TOPOLOGIES:
    add(
      f"--{kind}",
      dest="absent",
      action="store_const",
      const=kind,
      help=f"count for a {kind.upper()} that need not be there",
    )
  add(
    "--peers",
    action="store_true",
    help="the steps that have a like in PyTorch, and those",
  )
  add("--output", help="also write the rows to this JSON file")
  args = parser.parse_args()
  models, batch_sizes = DEFAULTS[args.absent is not None]
  args.models = args.models or models
  args.batch_sizes = args.batch_sizes or batch_sizes
  if min(args.batch_sizes) < 1 or args.rounds < 1:
    parser.error("--batch-sizes and --rounds must be positive")
  known = steps_lib.steps(lambda *args: None)
  if unknown := [name for name in args.steps if name not in known]:
    parser.error(f"--steps must be out of {list(known)}, got {unknown}")
  if args.absent and args.peers:
    parser.error(f"--{args.absent} counts: leave out --peers")
  if args.absent and not absent_device.COMPILES[args.absent]:
    parser.error(
      f'--{args.absent} needs its compiler. Run: pip install -e ".[pod]"'
    )
  if args.peers:
    args.steps = PEERED
    try:
      args.peers = importlib.import_module("torch_peers")
    except ImportError as error:
      parser.error(
        f"--peers needs {error.name}. Run: pip install torch pytorch_optimizer"
      )
  return args


def rows_of(args, model, batch_size):
  """Yields the rows of a model at a batch size."""
  if args.absent:
    yield from count_for(args.chip, model, batch_size, args.steps)
    return
  workload = workloads.WORKLOADS[model]()
  others = {}
  if args.peers:
    others = args.peers.steps(model, workload.batch(batch_size))
  yield from measure(workload, batch_size, args.rounds, args.steps, others)


def main():
  """Measures and prints the table."""
  args = parse()
  versions = {"jax": jax.__version__, "optax": optax.__version__}
  if args.peers:
    versions["torch"] = args.peers.torch.__version__
  if args.absent:
    args.chip = absent_device.devices(TOPOLOGIES[args.absent])[0]
    device = f"compiled for {args.chip.device_kind}"
  else:
    device = jax.devices()[0].device_kind
  print(
    f"{device}, {os.cpu_count()} cores, {platform.machine()}, "
    + ", ".join(f"{name} {version}" for name, version in versions.items())
  )
  columns = COUNTED + (COMPILED if args.absent else TIMED)
  print(heading(columns))
  rows = []
  for model in args.models:
    for batch_size in args.batch_sizes:
      for row in rows_of(args, model, batch_size):
        rows.append({"model": model, **row})
        print(line_of(rows[-1], columns), flush=True)
  if args.output:
    with open(args.output, "w") as file:
      json.dump(
        {"device": device, "versions": versions, "rows": rows}, file, indent=2
      )


if __name__ == "__main__":
  main()

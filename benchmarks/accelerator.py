"""What F-SAM does and costs on the GPU or the TPU of this machine.

One command, under eight minutes, nothing to download: whether the laws and the
recorded trajectories hold on the device; the time, traffic and memory of a
step against its floor and plain SGD; images a second of ``python -m fsam_optax
train``. It prints the rows as they come, and writes one JSON file anew after
each part, so that a run that is cut short keeps what it had:

  python benchmarks/accelerator.py [--output accelerator.json]
                                   [--parts checks cost train peak]
                                   [--budget 480]

Every part runs in processes of its own, one after another: a TPU belongs to
one process at a time, and a process's peak of memory is then that of one step.
``cost`` and ``peak`` need jax, flax, optax and numpy; ``checks`` pytest and
chex, too, and ``train`` the extra ``experiments``.

The exit status is 1 where a check fails or a part breaks.
"""

import argparse
from collections.abc import Iterator
from collections.abc import Sequence
import concurrent.futures
import contextlib
import importlib.metadata
from importlib.util import find_spec
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any, Callable, NamedTuple

import numpy as np

# JAX is imported by the processes of the jobs alone: the first to ask for the
# device would keep it from the others.

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("checks", "cost", "train", "peak")
MODELS = ("resnet18", "perceptron", "resnet18-bfloat16", "decoder")
STAGES = {  # The main ones of all models first, before time runs out.
  "main": (
    "SAM by hand",
    "F-SAM by hand",
    "fsam in a chain",
    "train step (default)",
    "train step, 1/8, average of the descent",
  ),
  "more": (
    "optax.contrib.sam",
    "train step, no skip",
    "train step, SAM",
    "train step, average of the descent",
    "train step, 1/8",
    "train step, bfloat16 average",
    "train step, every 2nd",
    "train step, 4 micro-batches",
  ),
  "quick": ("fsam in a chain", "train step (default)"),
}
# The laws, the recorded trajectories, and steps that are not finite.
CHECKS = (
  "test_laws.py",
  "test_golden.py",
  "test_numerics.py",
  "test_train_step.py",
)
PEAK_STEPS = ("SGD", "floor", "fsam in a chain", "train step (default)")
OPTIMIZERS = {  # Flags of `train`.
  "SGD": ("--optimizer=sgd",),
  "SAM": ("--optimizer=sam",),
  "F-SAM": ("--optimizer=fsam",),
  "F-SAM, 1/8": (
    "--optimizer=fsam",
    "--ascent-fraction=0.125",
    "--ema-gradient=descent",
  ),
}


class Job(NamedTuple):
  """What one process does.

  Attributes:
    name: for the report.
    part: one of :data:`WORKS`, and the list of the report that gets the rows.
    arguments: those of the work.
  """

  name: str
  part: str
  arguments: dict[str, Any]


# ---- The work of the processes, one job each.


def describe() -> Iterator[dict[str, Any]]:
  """Yields the device and the versions."""
  import jax

  packages = ("jax", "jaxlib", "flax", "optax", "numpy")
  device = jax.devices()[0]
  yield {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "runtime": device.client.platform_version,
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "python": sys.version.split()[0],
    "cores": os.cpu_count(),
    "versions": {x: importlib.metadata.version(x) for x in packages},
  }


class Outcomes:
  """The outcomes that pytest reports, a row a test."""

  def __init__(self) -> None:
    """Begins without a row."""
    self.rows: list[dict[str, Any]] = []

  def pytest_runtest_logreport(self, report: Any) -> None:
    """Adds the outcome of a test or of its fixtures."""
    if report.skipped or (report.passed and report.when != "call"):
      return
    message = "" if report.passed else str(report.longrepr)[-1500:]
    name = report.nodeid.rpartition("/")[-1]
    self.rows.append(
      {"check": name, "passed": report.passed, "message": message}
    )


def check(device: str, names: list[str]) -> Iterator[dict[str, Any]]:
  """Yields the outcomes of the tests that hold on any device.

  Where there are ``names``, of those alone that have one of them in theirs.
  """
  import pytest

  for name in CHECKS:  # The rows of a file are kept when time runs out.
    outcomes = Outcomes()
    status = pytest.main(
      [
        *(str(ROOT / "tests" / name), "-m", "device", f"--device={device}"),
        # With the plugin's report alone, and warnings that are no errors.
        *("-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"),
        *("-p", "no:terminal", "-k", " or ".join(names)),
      ],
      plugins=[outcomes],
    )
    yield from outcomes.rows
    if status not in (0, 1, 5):  # Passed, failed or nothing of these names.
      raise RuntimeError(f"pytest ended with status {int(status)} in {name}")


def time_steps(
  model: str, batch_size: int, steps: list[str], seconds: float
) -> Iterator[dict[str, Any]]:
  """Yields a row for each step, timed in turn with the floor and plain SGD.

  Three at a time, so that only their states take memory, for about ``seconds``.
  The rows are as those of step_cost.py, with an ``error`` in the place of the
  numbers where a step does not fit into the memory, for example.
  """
  import jax
  import step_cost
  import workloads

  workload = workloads.WORKLOADS[model]()
  batch = jax.device_put(workload.batch(batch_size))
  params, model_state, num_params = workload.shapes()
  against = ["SGD", "floor"]
  chosen = step_cost.chosen_steps(workload, batch_size, [*against, *steps])
  compiled = {}
  # Beside one another, and none any more while something is timed.
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for name, step in chosen.items():
      state = jax.eval_shape(step.init, params, model_state)
      compiled[name] = pool.submit(step_cost.compile_step, step, state, batch)
  call_of = lambda name: step_cost.repeated(
    compiled[name].result(),
    step_cost.first_state(workload, chosen[name]),
    batch,
  )
  calls = {name: call_of(name) for name in against}
  rows = []
  for name in (*against, *(name for name in steps if name in chosen)):
    row = {"model": model, "batch_size": batch_size, "parameters": num_params}
    rows.append({**row, "step": name})
    try:
      timed = calls if name in calls else {**calls, name: call_of(name)}
      rows[-1] |= step_cost.counts(compiled[name].result(), num_params)
      times = step_cost.time_calls(timed, seconds=seconds)
      rounds = len(times[name])
      rows[-1] |= {"rounds": rounds, **step_cost.times_of(name, times)}
      step_cost.above_floor(rows)
      step_cost.predict(rows, jax.devices()[0].device_kind)
    except Exception as exception:  # Such as too little memory.
      rows[-1]["error"] = f"{type(exception).__name__}: {exception}"[:500]
    timed = calls  # Lets go of a state before the next one is made.
    yield rows[-1]


def peak(model: str, batch_size: int, step: str) -> Iterator[dict[str, Any]]:
  """Yields the peak of the device's memory in a process of one step.

  It holds a state of zeros, the batch and three steps; and what XLA tries out
  while it compiles, where the program is not in the cache of a job before.
  """
  import jax
  from jax import numpy as jnp
  import step_cost
  import workloads

  workload = workloads.WORKLOADS[model]()
  batch = jax.device_put(workload.batch(batch_size))
  chosen = step_cost.chosen_steps(workload, batch_size, [step])[step]
  params, model_state, num_params = workload.shapes()
  shapes = jax.eval_shape(chosen.init, params, model_state)
  row, compiled = step_cost.counted(chosen, shapes, batch, num_params)
  # Not the real one: to draw and to copy it takes memory, too.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  stats = lambda: jax.devices()[0].memory_stats() or {}
  before = stats().get("bytes_in_use")
  step_cost.repeated(compiled, zeros, batch)(3)
  yield {
    **{"model": model, "batch_size": batch_size, "step": step, **row},
    "state_and_batch_bytes": before,
    "peak_bytes": stats().get("peak_bytes_in_use"),
  }


def train(
  optimizer: str, rows: int, side: int, flags: Sequence[str]
) -> Iterator[dict[str, Any]]:
  """Yields the images a second of the command's last epoch.

  The images are random, of ten classes; a hundredth as many are for the test.
  """
  from fsam_optax import __main__ as command

  rng, tests = np.random.default_rng(0), max(rows // 100, 20)
  images = rng.integers(0, 256, (rows + tests, side, side, 3), np.uint8)
  labels = (np.arange(rows + tests) % 10).astype(np.int32)
  with tempfile.TemporaryDirectory() as folder:
    data, output = f"{folder}/images.npz", f"{folder}/run"
    np.savez(
      data,
      x_train=images[tests:],
      y_train=labels[tests:],
      x_test=images[:tests],
      y_test=labels[:tests],
    )
    words = [f"--data={data}", f"--output={output}", "--epochs=2"]
    with contextlib.redirect_stdout(io.StringIO()):
      command.main(["train", *words, *OPTIMIZERS[optimizer], *flags])
    text = pathlib.Path(output, "seed-1", "metrics.jsonl").read_text()
  lines = map(json.loads, text.splitlines())
  # The first epoch compiles the evaluation.
  last = [line for line in lines if line["kind"] == "epoch"][-1]
  yield {"optimizer": optimizer, **last}


WORKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
  "device": describe,
  "checks": check,
  "cost": time_steps,
  "train": train,
  "peak": peak,
}
NEEDS = {  # Modules, of the parts that need more than the core does.
  "checks": ("pytest", "chex"),
  "train": ("filelock", "grain", "matplotlib", "orbax", "tyro"),
}


def work(job: Job, path: str) -> None:
  """Does a job in this process: prints its rows and appends them to a file."""
  with open(path, "a") as file:
    for row in WORKS[job.part](**job.arguments):
      file.write(json.dumps(row) + "\n")
      file.flush()
      print(line_of(job.part, row), flush=True)


SHOWN = {
  "milliseconds": "ms {:.3f}",
  "ratio_to_floor": "of the floor {:.3f}",
  "ratio_to_sgd": "of SGD {:.3f}",
  "predicted_ratio_to_sgd": "by its roofline {:.2f}",
  "words_above_floor": "words above {:.2f}",
  "temporary_above_floor": "trees above {:.2f}",
  "peak_bytes": "peak bytes {:,}",
  "images_per_second": "images/s {:,.0f}",
  "waiting_fraction": "waiting {:.1%}",
  "error": "{}",
}


def line_of(part: str, row: dict[str, Any]) -> str:
  """A row of the report as a line to print."""
  if part == "device":
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    return f"{row['devices']} x {row['device']}, {versions}"
  if part == "checks":
    outcome = "PASS" if row["passed"] else "FAIL"
    return f"{outcome} {row['check']} {row['message']}".rstrip()
  names = ("model", "batch_size", "step", "optimizer")
  label = " ".join(str(row[name]) for name in names if name in row)
  cells = [
    form.format(row[field])
    for field, form in SHOWN.items()
    if row.get(field) is not None
  ]
  return f"{part}: {label}: " + (", ".join(cells) or "not known here")


# ---- The main process: one job after another, until the time is up.


def plan(args: argparse.Namespace, platform: str) -> list[Job]:
  """The jobs in order, the most useful first."""

  def costs(batch_size, stage, models=args.models):
    for model in models:
      name = f"cost of {model}, {batch_size} rows, {stage}"
      arguments = {"model": model, "batch_size": batch_size}
      arguments["steps"] = STAGES[stage]
      arguments["seconds"] = 0.1 if args.quick else 1.0
      yield Job(name, "cost", arguments)

  def peaks(model, batch_size, steps):
    for step in steps:
      name = f"peak of {model}, {batch_size} rows, {step}"
      arguments = {"model": model, "batch_size": batch_size, "step": step}
      yield Job(name, "peak", arguments)

  def trains(optimizers, rows, side, *flags):
    flags = ("--recipe=cifar10-resnet18", *flags)
    for optimizer in optimizers:
      arguments = {"optimizer": optimizer, "rows": rows, "side": side}
      yield Job(f"train {optimizer}", "train", arguments | {"flags": flags})

  checks = Job("checks", "checks", {"device": platform, "names": args.checks})
  if args.quick:
    tiny = ("--model=cnn", "--depth=2", "--width=4", "--batch-size=32")
    return [
      checks,
      *costs(8, "quick", ["resnet-tiny"]),
      *trains(["F-SAM, 1/8"], 64, 8, *tiny),
      *peaks("mlp-tiny", 8, ["floor"]),
    ]
  return [
    checks,
    *costs(128, "main"),
    *trains(OPTIMIZERS, 25_600, 32, "--dtype=bfloat16"),
    *costs(1024, "main"),
    *peaks("resnet18", 1024, PEAK_STEPS),
    *peaks("perceptron", 128, PEAK_STEPS),
    *costs(128, "more"),
    *costs(1024, "more"),
  ]


class Run:
  """Does jobs until the budget is spent; the report is whole after each.

  Attributes:
    found: the report.
  """

  def __init__(self, args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Starts the clock and writes the empty report."""
    self._args, self._folder, self._start = args, folder, time.monotonic()
    self.found: dict[str, Any] = {
      "arguments": {k: str(v) for k, v in vars(args).items() if k != "job"},
      **{part: [] for part in (*WORKS, "skipped", "errors")},
      "seconds": {},
    }
    self._write()

  def do(self, job: Job) -> None:
    """Does a job in a process of its own and puts its rows into the report."""
    left = self._args.budget - (time.monotonic() - self._start)
    missing = [x for x in NEEDS.get(job.part, ()) if not find_spec(x)]
    if left <= 0:
      self._note("skipped", job, "the budget was spent")
    elif missing:
      remedy = f"pip install {' '.join(missing)}"
      self._note("skipped", job, f"needs: {remedy}")
    else:
      start = time.monotonic()
      self.found[job.part] += self._rows(job, left)
      self.found["seconds"][job.name] = time.monotonic() - start
    self._write()

  def _rows(self, job, seconds):
    """The rows that its process wrote; notes how that ended."""
    rows, log = self._folder / "rows.jsonl", self._folder / "log"
    rows.write_text("")
    flags = f"--job={json.dumps(job)}", f"--output={rows}"
    with open(log, "w") as file:
      try:
        done = subprocess.run(
          [sys.executable, __file__, *flags],
          env=self._environment(),
          stderr=file,
          timeout=seconds,
        )
      except subprocess.TimeoutExpired:
        self._note("skipped", job, "the budget was spent on the way")
      else:
        if done.returncode:
          text = log.read_text(errors="replace").strip()[-1500:]
          self._note("errors", job, f"status {done.returncode}: {text}")
    # A process that is killed may leave half a line.
    return [json.loads(line) for line in rows.read_text().split("\n")[:-1]]

  def _environment(self) -> dict[str, str]:
    """With this checkout's package and what the jobs before compiled."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if self._args.quick:
      return found | {"JAX_PLATFORMS": "cpu"}
    return {
      "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      **found,
    }

  def _note(self, kind: str, job: Job, reason: str) -> None:
    """Notes a job that was skipped or broke."""
    print(f"{kind}: {job.name}: {reason}", flush=True)
    self.found[kind].append({"job": job.name, "reason": reason})

  def _write(self) -> None:
    """Writes a file beside the old one, and moves it into its place."""
    self.found["total_seconds"] = time.monotonic() - self._start
    path = self._args.output
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps(self.found, indent=2) + "\n")
    beside.replace(path)


def parse() -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add("--output", type=pathlib.Path, default=pathlib.Path("accelerator.json"))
  add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
  add("--budget", type=float, default=480, help="seconds")
  add("--quick", action="store_true", help="tiny and on the CPU, to see it run")
  add(
    "--checks",
    nargs="+",
    default=[],
    metavar="TEXT",
    help="only those with one of these in their names",
  )
  add("--models", nargs="+", default=list(MODELS), help="for cost")
  add("--job", help=argparse.SUPPRESS)
  return parser.parse_args()


def main() -> int:
  """Does the jobs and returns the exit status."""
  args = parse()
  if args.job:
    work(Job(*json.loads(args.job)), args.output)
    return 0
  with tempfile.TemporaryDirectory() as folder:
    run = Run(args, pathlib.Path(folder))
    run.do(Job("device", "device", {}))
    platform = [row["platform"] for row in run.found["device"]] or ["cpu"]
    for job in plan(args, platform[0]):
      if job.part in args.parts:
        run.do(job)
  found = run.found
  passed = sum(row["passed"] for row in found["checks"])
  print(
    f"{passed} of {len(found['checks'])} checks pass, {len(found['errors'])} "
    f"errors, {len(found['skipped'])} skipped, {found['total_seconds']:.0f} s; "
    f"wrote {args.output}"
  )
  has_error = any("error" in row for row in (*found["cost"], *found["peak"]))
  has_failed = passed < len(found["checks"]) or found["errors"]
  return int(bool(has_failed or has_error))


if __name__ == "__main__":
  sys.exit(main())

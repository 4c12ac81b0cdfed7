"""What F-SAM does and costs on the GPU or the TPU of this machine.

One command, under eight minutes, nothing to download: whether the laws and the
recorded trajectories hold on the device; the time, traffic and memory of a
step against its floor and plain SGD; images a second of ``python -m fsam_optax
train``. It prints the rows as they come, and writes one JSON file anew after
each part, so that a run that is cut short keeps what it had:

  python benchmarks/accelerator.py [--output accelerator.json]
                                   [--parts checks cost train] [--budget 480]

Every part runs in processes of its own, one after another: a TPU belongs to
one process at a time, and a process's peak of memory is then that of one step.
``cost`` needs jax, flax, optax and numpy; ``checks`` pytest and chex, too, and
``train`` the package installed, with its extra ``experiments``.

The exit status is 1 where a check fails or a part breaks.
"""

import argparse
from collections.abc import Iterable
from collections.abc import Iterator
import concurrent.futures
import importlib.metadata
import importlib.util
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
PARTS = ("checks", "cost", "train")
MODELS = ("resnet18", "perceptron", "resnet18-bfloat16", "decoder")
QUICK_MODELS = ("resnet-tiny",)
BATCH_SIZES = (128, 1024)
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
PEAKS = (("resnet18", 1024), ("perceptron", 128))
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
OF_TRAIN = ("grain", "matplotlib", "orbax.checkpoint")


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

  versions = {}
  for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
    versions[package] = importlib.metadata.version(package)
  device = jax.devices()[0]
  yield {
    "device": device.device_kind,
    "platform": device.platform,
    "devices": jax.device_count(),
    "runtime": device.client.platform_version,
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "python": sys.version.split()[0],
    "cores": os.cpu_count(),
    "versions": versions,
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
    row = {"check": name, "passed": report.passed, "message": message}
    self.rows.append(row)
    print(line_of("checks", row), flush=True)


def check(device: str, names: list[str]) -> Iterator[dict[str, Any]]:
  """Yields the outcomes of the tests that hold on any device.

  Args:
    device: "cpu", "gpu" or "tpu".
    names: parts of the names of those to run; all where empty.

  Yields:
    Dicts of ``check``, ``passed`` and ``message``, where it failed.
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

  Three at a time, so that only their states take memory.

  Args:
    model: one of the workloads.
    batch_size: rows.
    steps: what to time besides the floor and SGD.
    seconds: about as long for each.

  Yields:
    Rows as those of step_cost.py; ``error`` in the place of the numbers where a
    step does not fit into the memory, for example.
  """
  import jax
  import step_cost

  workload, batch = _on_device(model, batch_size)
  against = ["SGD", "floor"]
  chosen = step_cost.chosen_steps(workload, batch_size, [*against, *steps])
  compiled = _compile(workload, batch, chosen)
  num_params = step_cost.shapes_of(workload)[-1]
  call_of = lambda name: step_cost.Repeated(
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


def _on_device(model, batch_size):
  """A workload, and a batch of it on the device."""
  import jax
  import workloads

  workload = workloads.WORKLOADS[model]()
  batch = workload.make_batch(np.random.default_rng(0), batch_size)
  return workload, jax.device_put(batch)


def _compile(workload, batch, chosen):
  """Futures of the compiled steps by name, all of them done."""
  import jax
  import step_cost

  params, model_state, _ = step_cost.shapes_of(workload)
  compiled = {}
  # Beside one another, and none any more while something is timed.
  with concurrent.futures.ThreadPoolExecutor(
    max(1, min(8, (os.cpu_count() or 1) // 2))
  ) as pool:
    for name, step in chosen.items():
      state = jax.eval_shape(step.init, params, model_state)
      compiled[name] = pool.submit(step_cost.compile_step, step, state, batch)
  return compiled


def peak(model: str, batch_size: int, step: str) -> Iterator[dict[str, Any]]:
  """Yields the peak of the device's memory in a process of one step.

  It holds a state of zeros, the batch and three steps; and what XLA tries out
  while it compiles, where the program is not in the cache of a job before.
  """
  import jax
  from jax import numpy as jnp
  import step_cost

  workload, batch = _on_device(model, batch_size)
  chosen = step_cost.chosen_steps(workload, batch_size, [step])[step]
  params, model_state, num_params = step_cost.shapes_of(workload)
  shapes = jax.eval_shape(chosen.init, params, model_state)
  row, compiled = step_cost.counted(chosen, shapes, batch, num_params)
  # Not the real one: to draw and to copy it takes memory, too.
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  stats = lambda: jax.devices()[0].memory_stats() or {}
  before = stats().get("bytes_in_use")
  step_cost.Repeated(compiled, zeros, batch)(3)
  yield {
    **{"model": model, "batch_size": batch_size, "step": step, **row},
    "state_and_batch_bytes": before,
    "peak_bytes": stats().get("peak_bytes_in_use"),
  }


WORKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
  "device": describe,
  "checks": check,
  "cost": time_steps,
  "peak": peak,
}


def work(job: Job, path: str) -> None:
  """Does a job in this process: prints its rows and appends them to a file."""
  with open(path, "a") as file:
    for row in WORKS[job.part](**job.arguments):
      file.write(json.dumps(row) + "\n")
      file.flush()
      if job.part != "checks":  # Those are printed as they come.
        print(line_of(job.part, row), flush=True)


def line_of(part: str, row: dict[str, Any]) -> str:
  """A row of the report as a line to print."""
  if part == "device":
    versions = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
    return f"{row['devices']} x {row['device']}, {versions}"
  if part == "checks":
    outcome = "PASS" if row["passed"] else "FAIL"
    return f"{outcome} {row['check']} {row['message']}".rstrip()
  shown = {
    "ms": ("milliseconds", ".3f"),
    "of the floor": ("ratio_to_floor", ".3f"),
    "of SGD": ("ratio_to_sgd", ".3f"),
    "by its roofline": ("predicted_ratio_to_sgd", ".2f"),
    "words above": ("words_above_floor", ".2f"),
    "trees above": ("temporary_above_floor", ".2f"),
    "peak MB": ("peak_megabytes", ",.0f"),
    "images/s": ("images_per_second", ",.0f"),
    "waiting": ("waiting_fraction", ".1%"),
  }
  if row.get("peak_bytes") is not None:
    row = {**row, "peak_megabytes": row["peak_bytes"] / 1e6}
  cells = [
    f"{name} {row[field]:{form}}"
    for name, (field, form) in shown.items()
    if row.get(field) is not None
  ]
  if "error" in row:
    cells.append(row["error"].splitlines()[0])
  names = ("model", "batch_size", "step", "optimizer")
  label = " ".join(str(row[name]) for name in names if name in row)
  return f"{part}: {label}: " + (", ".join(cells) or "not known here")


# ---- The main process: one job after another, until the time is up.


class Report:
  """The results, in a file that is whole after each job."""

  def __init__(self, path: pathlib.Path, arguments: dict[str, Any]) -> None:
    """Writes the empty report."""
    self._path, self._start = path, time.monotonic()
    self.found: dict[str, Any] = {
      "arguments": arguments,
      "device": None,
      **{part: [] for part in ("checks", "cost", "peak", "train")},
      "skipped": [],
      "errors": [],
      "seconds": {},
    }
    self.write()

  def write(self) -> None:
    """Writes a file beside the old one, and moves it into its place."""
    self.found["total_seconds"] = time.monotonic() - self._start
    beside = self._path.with_name(f"{self._path.name}.part")
    beside.write_text(json.dumps(self.found, indent=2) + "\n")
    beside.replace(self._path)

  def skip(self, name: str, reason: str) -> None:
    """Notes a job that was not done."""
    print(f"skipped {name}: {reason}", flush=True)
    self.found["skipped"].append({"job": name, "reason": reason})

  def fail(self, name: str, message: str) -> None:
    """Notes a job that broke."""
    print(f"error in {name}: {message}", flush=True)
    self.found["errors"].append({"job": name, "error": message})

  @property
  def status(self) -> int:
    """The exit status: 0 without errors and with all checks passed."""
    found = self.found
    has_failed = any(not row["passed"] for row in found["checks"])
    rows = (*found["cost"], *found["peak"])
    is_bad = has_failed or found["errors"] or any("error" in x for x in rows)
    return int(bool(is_bad))


class Runner:
  """Runs commands in turn until the budget is spent."""

  def __init__(
    self, report: Report, folder: pathlib.Path, budget: float, quick: bool
  ) -> None:
    """Starts the clock."""
    self.report, self.folder, self.quick = report, folder, quick
    self._end = time.monotonic() + budget

  @property
  def left(self) -> float:
    """Seconds of the budget that are left."""
    return self._end - time.monotonic()

  def command(
    self, name: str, command: list[str], *, shows: bool = True
  ) -> None:
    """Runs a command, and notes in the report if it breaks or is skipped.

    Args:
      name: of the job, for the report.
      command: to run, with this checkout's package.
      shows: whether to print its output.
    """
    if self.left <= 0:
      self.report.skip(name, "the budget was spent")
      return
    log = self.folder / "log"
    start = time.monotonic()
    with open(log, "w") as file:
      process = subprocess.Popen(
        command,
        env=self._environment(),
        stdout=None if shows else file,
        stderr=file,
      )
      try:
        status = process.wait(timeout=self.left)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = None
        self.report.skip(name, "the budget was spent on the way")
    if status:
      text = log.read_text(errors="replace").strip()
      self.report.fail(name, f"status {status}: {text[-1500:]}")
    self.report.found["seconds"][name] = time.monotonic() - start

  def _environment(self) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if self.quick:
      return found | {"JAX_PLATFORMS": "cpu"}
    # The next job reads the compiled programs of this one.
    return {
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      **found,
    }

  def job(self, job: Job) -> None:
    """Runs a job and puts its rows into the report."""
    path = self.folder / "rows.jsonl"
    path.write_text("")
    flags = f"--job={json.dumps(job)}", f"--output={path}"
    self.command(job.name, [sys.executable, __file__, *flags])
    # A process that is killed may leave half a line.
    lines = path.read_text().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    if job.part == "device":
      self.report.found["device"] = rows[0] if rows else None
    else:
      self.report.found[job.part] += rows
    self.report.write()

  def train(self, optimizer: str, flags: Iterable[str]) -> None:
    """Runs ``python -m fsam_optax train``, for a row of its last epoch."""
    name = f"train {optimizer}"
    output = self.folder / name.replace(" ", "-").replace("/", "-")
    start = time.monotonic()
    self.command(
      name,
      [
        *(sys.executable, "-m", "fsam_optax", "train", f"--output={output}"),
        *(*OPTIMIZERS[optimizer], *flags),
      ],
      shows=False,
    )
    path = output / "seed-1" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    epochs = [x for x in map(json.loads, lines) if x["kind"] == "epoch"]
    if not epochs:
      return
    row = {
      "optimizer": optimizer,
      "epochs": len(epochs),
      # The first epoch compiles the evaluation.
      "images_per_second": epochs[-1]["images_per_second"],
      "waiting_fraction": epochs[-1]["waiting_fraction"],
      "epoch_seconds": epochs[-1]["seconds"],
      "wall_seconds": time.monotonic() - start,
      "loss": epochs[-1]["loss"],
      "skipped_steps": epochs[-1]["skipped"],
    }
    print(line_of("train", row), flush=True)
    self.report.found["train"].append(row)
    self.report.write()


def checks_of(runner: Runner, args: argparse.Namespace) -> None:
  """The laws and the recorded trajectories."""
  if importlib.util.find_spec("pytest") and importlib.util.find_spec("chex"):
    device = (runner.report.found["device"] or {}).get("platform", "cpu")
    arguments = {"device": device, "names": args.checks}
    runner.job(Job("checks", "checks", arguments))
  else:
    runner.report.skip("checks", "needs: pip install pytest chex")


def cost_of(
  runner: Runner, models: Iterable[str], batch_size: int, stage: str
) -> None:
  """The time of one stage of the steps, on every model."""
  for model in models:
    arguments = {
      "model": model,
      "batch_size": batch_size,
      "steps": STAGES[stage],
      "seconds": 0.1 if runner.quick else 1.0,
    }
    name = f"cost of {model}, {batch_size} rows, {stage}"
    runner.job(Job(name, "cost", arguments))


def peaks_of(runner: Runner, args: argparse.Namespace) -> None:
  """The peaks of memory, of some."""
  del args
  peaks, steps = (PEAKS, PEAK_STEPS)
  if runner.quick:
    peaks, steps = (("mlp-tiny", 8),), ("floor",)
  for model, batch_size in peaks:
    for step in steps:
      name = f"peak of {model}, {batch_size} rows, {step}"
      arguments = {"model": model, "batch_size": batch_size, "step": step}
      runner.job(Job(name, "peak", arguments))


def train_of(runner: Runner, args: argparse.Namespace) -> None:
  """Images a second of the command, on random images of CIFAR's shape."""
  del args
  missing = [
    name
    for name in OF_TRAIN
    if importlib.util.find_spec(name.partition(".")[0]) is None
  ]
  try:
    importlib.metadata.version("fsam-optax")
  except importlib.metadata.PackageNotFoundError:
    missing.append("fsam-optax")
  if missing:
    runner.report.skip(
      "train",
      f"needs {', '.join(missing)}. Run: pip install -e '.[experiments]'",
    )
    return
  path = runner.folder / "images.npz"
  write_images(path, *((64, 8) if runner.quick else (25_600, 32)))
  flags = [f"--data={path}", "--recipe=cifar10-resnet18", "--epochs=2"]
  if runner.quick:
    flags += ["--depth=10", "--width=4", "--batch-size=32", "--cutout=0"]
  else:
    flags.append("--dtype=bfloat16")
  for optimizer in ("F-SAM, 1/8",) if runner.quick else OPTIMIZERS:
    runner.train(optimizer, flags)


def write_images(path: pathlib.Path, rows: int, side: int) -> None:
  """An archive of random images, ten classes, a hundredth for the test."""
  rng = np.random.default_rng(0)
  tests = max(rows // 100, 20)
  images = rng.integers(0, 256, (rows + tests, side, side, 3), np.uint8)
  labels = (np.arange(rows + tests) % 10).astype(np.int32)
  np.savez(
    path,
    x_train=images[tests:],
    y_train=labels[tests:],
    x_test=images[:tests],
    y_test=labels[:tests],
  )


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


def plan(quick: bool) -> list[tuple[str, Callable[..., None]]]:
  """The work in order, the most useful first, each with its part."""
  if quick:
    costs = [lambda runner, _: cost_of(runner, QUICK_MODELS, 8, "quick")]
  else:
    costs = [
      lambda runner, args, rows=rows, stage=stage: cost_of(
        runner, args.models, rows, stage
      )
      for stage in ("main", "more")
      for rows in BATCH_SIZES
    ]
  first, *others = (("cost", cost) for cost in costs)
  return [
    ("checks", checks_of),
    first,
    ("train", train_of),
    *others[:1],
    ("cost", peaks_of),
    *others[1:],
  ]


def main() -> int:
  """Runs the parts and returns the exit status."""
  args = parse()
  if args.job:
    work(Job(*json.loads(args.job)), args.output)
    return 0
  arguments = {k: v for k, v in vars(args).items() if k != "job"}
  arguments["output"] = str(args.output)
  report = Report(args.output, arguments)
  with tempfile.TemporaryDirectory() as folder:
    runner = Runner(report, pathlib.Path(folder), args.budget, args.quick)
    runner.job(Job("device", "device", {}))
    for part, run in plan(args.quick):
      if part not in args.parts:
        continue
      try:
        run(runner, args)
      except Exception as exception:  # It must not lose the other parts.
        report.fail(part, f"{type(exception).__name__}: {exception}")
      report.write()
  found = report.found
  print(
    f"{sum(row['passed'] for row in found['checks'])} of "
    f"{len(found['checks'])} checks pass, {len(found['errors'])} errors, "
    f"{len(found['skipped'])} skipped, {found['total_seconds']:.0f} s; "
    f"wrote {args.output}"
  )
  return report.status


if __name__ == "__main__":
  sys.exit(main())

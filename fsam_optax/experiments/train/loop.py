"""One run of ``train``: from its last checkpoint to its end, or to a signal."""

import concurrent.futures
import contextlib
import math
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any, Optional

import jax
from jax.experimental import multihost_utils
import numpy as np

from fsam_optax._parallel import host_metrics
from fsam_optax._parallel import place_state
from fsam_optax.experiments import batches as batches_lib
from fsam_optax.experiments import program as program_lib
from fsam_optax.experiments import run_folder
from fsam_optax.experiments import train_report
from fsam_optax.experiments.train_settings import Dataset

_MOST_SKIPPED = 20  # Steps in a row, after which a run is given up.


class DivergedError(RuntimeError):
  """A run whose loss or gradients have ceased to be finite."""


class Interrupted(Exception):
  """A run that was told to end, and has saved.

  Attributes:
    status: what the process should end with.
  """

  def __init__(self, message: str, status: int) -> None:
    super().__init__(message)
    self.status = status


class Interruption:
  """Takes note of SIGTERM and SIGINT, for a run to save and end.

  With several processes JAX takes note of SIGTERM, and tells all of them of the
  step to end at.
  """

  def __init__(self) -> None:
    """Nothing is installed before the context is entered."""
    self._signal: Optional[int] = None
    self._is_saved = True
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Interruption":
    if jax.process_count() == 1 and (
      threading.current_thread() is threading.main_thread()
    ):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def begin(self) -> None:
    """From now on there is something to save."""
    self._is_saved = False

  def status(self, batches: int) -> Optional[int]:
    """What to end with, or None to go on.

    Args:
      batches: the number taken, the same in every process.

    Returns:
      0 after SIGTERM, 130 after SIGINT, or None.
    """
    if jax.process_count() > 1:
      return (
        0 if multihost_utils.reached_preemption_sync_point(batches) else None
      )
    return None if self._signal is None else _STATUS[self._signal]

  def _note(self, number, frame) -> None:
    del frame
    message = None
    if self._is_saved:
      message = "told to end; no step was taken since"
    elif self._signal == number == signal.SIGINT:
      message = "told to end twice; what was not saved is lost"
    if message:
      # Not by an exception: the compiler may be at work on another thread.
      print(message, file=sys.stderr, flush=True)
      os._exit(_STATUS[number])
    self._signal = self._signal or number


_STATUS: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Runner:
  """Trains seeds by the same compiled programs."""

  def __init__(
    self,
    program: program_lib.Program,
    interruption: Interruption,
    *,
    save_every: Optional[int],
    log_every: int,
    evaluation_rows: int,
    tensorboard: bool,
  ) -> None:
    """Nothing is compiled before a seed needs it.

    Args:
      program: the functions.
      interruption: asked after every step.
      save_every: steps between checkpoints within an epoch, or None.
      log_every: steps between two lines of metrics.
      evaluation_rows: rows at a time, of all devices together.
      tensorboard: whether to write for TensorBoard.
    """
    self._program, self._interruption = program, interruption
    self._save_every, self._log_every = save_every, log_every
    self._tensorboard = tensorboard
    devices = program.mesh.size
    self._evaluate = program.evaluator(-(-evaluation_rows // devices) * devices)
    self._steps: dict[int, Any] = {}

  def __call__(
    self, dataset: Dataset, seed: int, folder: pathlib.Path
  ) -> list[dict[str, Any]]:
    """Trains from the last checkpoint of a folder to the end.

    Args:
      dataset: rows and labels.
      seed: of the initialisation, the order and the augmentation.
      folder: of this seed.

    Returns:
      One line of metrics for each epoch.

    Raises:
      Interrupted: if a signal came; everything is saved.
      DivergedError: if too many steps in a row were skipped.
      FolderError: if the folder cannot be read or written.
    """
    program, config = self._program, self._program.config
    is_first = jax.process_index() == 0
    checkpoints = run_folder.Checkpoints(folder / "checkpoints")
    progress = checkpoints.restore(program.abstract(), _warn)
    if progress is None:
      progress = place_state(program.create(seed), program.mesh)
    done = host_metrics({"batches": progress.batches})["batches"]
    journal = _open_journal(folder, done) if is_first else None
    if done == program.steps:
      checkpoints.close()
      return _epochs(journal)
    self._compile()
    plan = batches_lib.Plan(
      len(dataset.y),
      config.batch_size,
      drop_last=config.drop_last,
      seed=seed,
    )
    stream = batches_lib.Batches(
      plan, dataset.x, dataset.y, program.mesh, start=done, stop=program.steps
    )
    steps_an_epoch = plan.steps_an_epoch
    writer = train_report.Writer(
      folder,
      journal,
      self._tensorboard,
      total=program.steps,
      done=done,
      rows=config.batch_size,
    )
    if is_first:
      print(
        f"seed {seed}: from batch {done:,} of {program.steps:,}, on "
        f"{program.mesh.size} devices",
        flush=True,
      )
    clock = _Clock(stream)
    with writer, contextlib.closing(checkpoints):
      for number in range(done, program.steps):
        batch = next(stream)
        rows = len(batch["label"])
        # The step computes on while this process goes on, but for a CPU,
        # where the collectives of many steps in flight can deadlock.
        progress, metrics = self._steps[rows](progress, batch)
        if jax.default_backend() == "cpu":
          jax.block_until_ready(progress)
        self._interruption.begin()
        clock.count(rows)
        batches = number + 1
        epoch, position = divmod(batches, steps_an_epoch)
        line = {"batches": batches, "epoch": batches / steps_an_epoch}
        if batches % self._log_every == 0:
          self._check(progress, checkpoints)
          writer.step(
            {"kind": "step", **line, **_finite(host_metrics(metrics))}
          )
        accuracy = None
        if position == 0:
          self._check(progress, checkpoints)
          line = {"kind": "epoch", **line, "epoch": epoch}
          line |= self._measure(progress, dataset)
          accuracy = line[f"{dataset.evaluated}_accuracy"]
          writer.epoch({**line, **clock.lap()})
        is_due = self._save_every and batches % self._save_every == 0
        if position == 0 or is_due:
          checkpoints.save(batches, progress, accuracy)
        if (status := self._interruption.status(batches)) is not None:
          checkpoints.save(batches, progress, accuracy)
          checkpoints.wait()
          raise Interrupted(
            f"told to end; saved after batch {batches:,} of "
            f"{program.steps:,}. Give the same command to go on",
            status,
          )
      checkpoints.wait()
    return _epochs(journal)

  def _compile(self) -> None:
    """Compiles the step for a whole batch and for the last of an epoch."""
    if self._steps:
      return
    program = self._program
    sizes = {program.config.batch_size, program.shapes.last_size} - {0}
    # On threads, so that a signal is heard meanwhile.
    with concurrent.futures.ThreadPoolExecutor() as pool:
      compiled = {
        rows: pool.submit(program.lower_step(rows).compile) for rows in sizes
      }
      while not all(future.done() for future in compiled.values()):
        time.sleep(0.05)
      self._steps = {rows: future.result() for rows, future in compiled.items()}

  def _measure(self, progress, dataset: Dataset) -> dict[str, Any]:
    """The means of an epoch, the next learning rate, and the evaluation."""
    program = self._program
    counts = host_metrics(
      {"skipped": progress.skipped, "step": progress.state.step}
    )
    rate = program_lib.learning_rate_of(program.config, program.steps)
    evaluated = self._evaluate(
      progress.state, dataset.x_evaluated, dataset.y_evaluated
    )
    return {
      "learning_rate": np.asarray(rate(counts["step"])).item(),
      **_finite(program_lib.means(progress)),
      "skipped": counts["skipped"],
      **_finite({f"{dataset.evaluated}_{k}": v for k, v in evaluated.items()}),
    }

  def _check(self, progress, checkpoints) -> None:
    checkpoints.check()
    skipped = host_metrics({"n": progress.skipped_in_a_row})["n"]
    if skipped >= _MOST_SKIPPED:
      raise DivergedError(
        f"the last {skipped} steps were skipped: their loss or gradient was "
        "not finite. Choose a smaller --learning-rate or --rho and another "
        "--output; the checkpoints hold the weights of before"
      )


class _Clock:
  """Seconds and images since the last lap."""

  def __init__(self, stream: batches_lib.Batches) -> None:
    self._stream = stream
    self._start, self._waited, self._rows = time.perf_counter(), 0.0, 0

  def count(self, rows: int) -> None:
    self._rows += rows

  def lap(self) -> dict[str, float]:
    now, waited = time.perf_counter(), self._stream.waited
    seconds = now - self._start
    found = {
      "seconds": seconds,
      "images_per_second": self._rows / seconds,
      "waiting_share": (waited - self._waited) / seconds,
    }
    self._start, self._waited, self._rows = now, waited, 0
    return found


def _open_journal(folder: pathlib.Path, done: int) -> run_folder.Journal:
  folder.mkdir(parents=True, exist_ok=True)
  return run_folder.Journal(folder / "metrics.jsonl", done)


def _epochs(journal: Optional[run_folder.Journal]) -> list[dict[str, Any]]:
  if journal is None:
    return []
  return [line for line in journal.lines if line["kind"] == "epoch"]


def _finite(numbers: dict[str, Any]) -> dict[str, Any]:
  """None for what JSON has no number for."""
  return {
    name: value if value is not None and math.isfinite(value) else None
    for name, value in numbers.items()
  }


def _warn(message: str) -> None:
  print(f"warning: {message}", file=sys.stderr, flush=True)

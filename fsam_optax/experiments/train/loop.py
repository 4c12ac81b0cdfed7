"""The loop of a run: from its last checkpoint to its end, or to a signal."""

import concurrent.futures
import contextlib
import pathlib
import sys
import time
from typing import Any, Optional

import jax
import numpy as np

from fsam_optax.experiments.train import batches as batches_lib
from fsam_optax.experiments.train import metrics as metrics_lib
from fsam_optax.experiments.train.checkpoints import Checkpoints
from fsam_optax.experiments.train.evaluation import evaluator
from fsam_optax.experiments.train.flags import Run
from fsam_optax.experiments.train.interruption import Interrupted
from fsam_optax.experiments.train.interruption import Interruption
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.rows import Dataset
from fsam_optax.experiments.train.state import State

_MOST_SKIPPED = 20  # Steps in a row, after which a run is given up.


class DivergedError(RuntimeError):
  """A run whose loss or gradients have ceased to be finite."""


class Runner:
  """Trains seeds by the same compiled programs."""

  def __init__(
    self, program: Program, interruption: Interruption, run: Run
  ) -> None:
    """Nothing is compiled before a seed needs it.

    Args:
      program: the functions.
      interruption: asked after every step.
      run: what is written, and how often.
    """
    self._program, self._interruption, self._run = program, interruption, run
    self._evaluate: Any = None
    self._steps: dict[tuple[int, bool], Any] = {}

  def __call__(
    self, dataset: Dataset, seed: int, folder: pathlib.Path
  ) -> list[dict[str, Any]]:
    """Trains from the last checkpoint of a folder to the end.

    Args:
      dataset: rows and labels.
      seed: of the initialization, the order and the augmentation.
      folder: of this seed.

    Returns:
      One line of metrics for each epoch; none in a process but the first.

    Raises:
      Interrupted: if a signal came; everything is saved.
      DivergedError: if too many steps in a row were skipped.
      FolderError: if the folder cannot be read or written.
    """
    if self._evaluate is None:
      devices = self._program.mesh.size
      rows = min(self._run.evaluation_batch_size, len(dataset.y_evaluated))
      self._evaluate = evaluator(self._program, -(-rows // devices) * devices)
    with contextlib.closing(
      Checkpoints(folder / "checkpoints", _warn)
    ) as checkpoints:
      state = self._begin(checkpoints, seed)
      journal = None
      if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        journal = metrics_lib.Journal(
          folder / "metrics.jsonl",
          state.batches,
          state.batches // self._program.shapes.steps_an_epoch,
        )
      if state.batches < self._program.steps:
        self._compile(state.batches)
        with self._writer(folder, journal, seed, state.batches) as writer:
          self._train(state, dataset, seed, writer, checkpoints)
    return [] if journal is None else journal.epochs

  def _begin(self, checkpoints: Checkpoints, seed: int) -> State:
    """Goes on from the last checkpoint, or begins where there is none."""
    program = self._program
    if (read := checkpoints.restore(program.abstract())) is not None:
      return State(program, *read)
    return State(program, program.place(program.create(seed)))

  def _writer(
    self,
    folder: pathlib.Path,
    journal: Optional[metrics_lib.Journal],
    seed: int,
    done: int,
  ) -> metrics_lib.Writer:
    """Says where a seed begins, and opens what its metrics are written to."""
    program = self._program
    if journal is not None:
      print(
        f"seed {seed}: from batch {done:,} of {program.steps:,}, on "
        f"{program.mesh.size} devices",
        flush=True,
      )
    return metrics_lib.Writer(
      folder,
      journal,
      tensorboard=self._run.tensorboard,
      title=f"seed {seed}",
      total=program.steps,
      done=done,
      rows=program.config.descent.batch_size,
    )

  def _train(
    self,
    state: State,
    dataset: Dataset,
    seed: int,
    writer: metrics_lib.Writer,
    checkpoints: Checkpoints,
  ) -> None:
    """The steps that are left, with what is due after each."""
    program, run = self._program, self._run
    stream = self._batches(dataset, seed, state.batches)
    clock = metrics_lib.Clock(stream)
    for batch in stream:
      rows = len(batch["label"])
      ascends = program.ascends(state.batches)
      metrics = state.take(self._steps[rows, ascends], batch)
      self._interruption.begin()
      clock.count(rows)
      line = {"batches": state.batches, "epoch": state.epoch}
      accuracy, is_end = None, isinstance(state.epoch, int)
      if is_end or state.batches % run.log_every == 0:
        _check(state, checkpoints)
      if state.batches % run.log_every == 0:
        writer.step({**line, **metrics_lib.finite(_numbers(metrics))})
      if is_end:
        line |= state.measure(dataset, self._evaluate)
        accuracy = line[f"{dataset.evaluated}_accuracy"]
        writer.epoch({**line, **clock.lap()})
      if is_end or (run.save_every and state.batches % run.save_every == 0):
        state.save(checkpoints, accuracy)
      self._end_if_told(state, checkpoints, accuracy)
    checkpoints.wait()

  def _batches(
    self, dataset: Dataset, seed: int, start: int
  ) -> batches_lib.Batches:
    """The batches of a seed that are left."""
    program, descent = self._program, self._program.config.descent
    order = batches_lib.Order(
      len(dataset.y),
      descent.batch_size,
      drop_last=descent.drop_last,
      seed=seed,
    )
    return batches_lib.Batches(
      order,
      dataset.x,
      dataset.y,
      program.mesh,
      start=start,
      stop=program.steps,
    )

  def _end_if_told(
    self, state: State, checkpoints: Checkpoints, accuracy: Optional[float]
  ) -> None:
    status = self._interruption.status()
    if status is None:
      return
    state.save(checkpoints, accuracy)
    checkpoints.wait()
    raise Interrupted(
      f"told to end; saved after batch {state.batches:,} of "
      f"{self._program.steps:,}. Give the same command to go on",
      status,
    )

  def _compile(self, done: int) -> None:
    """Compiles the steps that are left: by batch size, and by the gate."""
    program, needed = self._program, set()
    for number in range(done, program.steps):
      is_last = (number + 1) % program.shapes.steps_an_epoch == 0
      rows = program.config.descent.batch_size
      if is_last and program.shapes.last_size:
        rows = program.shapes.last_size
      needed.add((rows, program.ascends(number)))
    # On threads, so that a signal is heard meanwhile.
    with concurrent.futures.ThreadPoolExecutor() as pool:
      compiled = {
        key: pool.submit(program.lower_step(key[0], ascends=key[1]).compile)
        for key in needed - self._steps.keys()
      }
      while not all(future.done() for future in compiled.values()):
        time.sleep(0.05)
    self._steps |= {key: future.result() for key, future in compiled.items()}


def _check(state: State, checkpoints: Checkpoints) -> None:
  """Raises if a checkpoint could not be written, or nothing moves any more."""
  checkpoints.check()
  if (skipped := state.skipped_in_a_row) >= _MOST_SKIPPED:
    raise DivergedError(
      f"the last {skipped} steps were skipped: their loss or gradient was "
      "not finite. Choose a smaller --learning-rate or --rho and another "
      "--output; the checkpoints hold the weights of before"
    )


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
  """The metrics of a step on the host."""
  return {name: np.asarray(x).item() for name, x in metrics.items()}


def _warn(message: str) -> None:
  print(f"warning: {message}", file=sys.stderr, flush=True)

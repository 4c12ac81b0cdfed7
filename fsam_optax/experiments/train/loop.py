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
from fsam_optax.experiments.train import means
from fsam_optax.experiments.train import metrics as metrics_lib
from fsam_optax.experiments.train import optimizer
from fsam_optax.experiments.train.checkpoints import Checkpoints
from fsam_optax.experiments.train.data import Dataset
from fsam_optax.experiments.train.evaluation import Evaluate
from fsam_optax.experiments.train.evaluation import evaluator
from fsam_optax.experiments.train.interruption import Interrupted
from fsam_optax.experiments.train.interruption import Interruption
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.settings import Run

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
    devices = program.mesh.size
    rows = -(-run.evaluation_batch_size // devices) * devices
    self._evaluate = evaluator(program, rows)
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
    program = self._program
    with contextlib.closing(Checkpoints(folder / "checkpoints")) as checkpoints:
      read = checkpoints.restore(program.abstract(), _warn)
      if read is None:
        state = State(program, program.place(program.create(seed)))
      else:
        state = State(program, *read)
      journal = None
      if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        journal = metrics_lib.Journal(folder / "metrics.jsonl", state.batches)
      if state.batches < program.steps:
        self._compile(state.batches)
        if journal is not None:
          print(
            f"seed {seed}: from batch {state.batches:,} of {program.steps:,}, "
            f"on {program.mesh.size} devices",
            flush=True,
          )
        with metrics_lib.Writer(
          folder,
          journal,
          tensorboard=self._run.tensorboard,
          title=f"seed {seed}",
          total=program.steps,
          done=state.batches,
          rows=program.config.descent.batch_size,
        ) as writer:
          self._train(state, dataset, seed, writer, checkpoints)
    return [] if journal is None else journal.epochs

  def _train(
    self,
    state: "State",
    dataset: Dataset,
    seed: int,
    writer: metrics_lib.Writer,
    checkpoints: Checkpoints,
  ) -> None:
    """The steps that are left, with what is due after each."""
    program, descent = self._program, self._program.config.descent
    order = batches_lib.Order(
      len(dataset.y),
      descent.batch_size,
      drop_last=descent.drop_last,
      seed=seed,
    )
    stream = batches_lib.Batches(
      order,
      dataset.x,
      dataset.y,
      program.mesh,
      start=state.batches,
      stop=program.steps,
    )
    clock = metrics_lib.Clock(stream)
    for batch in stream:
      rows = len(batch["label"])
      ascends = program.ascends(state.batches)
      metrics = state.take(self._steps[rows, ascends], batch)
      self._interruption.begin()
      clock.count(rows)
      line = {"batches": state.batches, "epoch": state.epoch}
      if state.batches % self._run.log_every == 0:
        _check(state, checkpoints)
        writer.step({**line, **metrics_lib.finite(_numbers(metrics))})
      accuracy, is_end = None, state.batches % order.steps_an_epoch == 0
      if is_end:
        _check(state, checkpoints)
        line |= state.measure(dataset, self._evaluate)
        accuracy = line[f"{dataset.evaluated}_accuracy"]
        writer.epoch({**line, **clock.lap()})
      save_every = self._run.save_every
      if is_end or (save_every and state.batches % save_every == 0):
        state.save(checkpoints, accuracy)
      self._end_if_told(state, checkpoints, accuracy)
    checkpoints.wait()

  def _end_if_told(
    self, state: "State", checkpoints: Checkpoints, accuracy: Optional[float]
  ) -> None:
    status = self._interruption.status(state.batches)
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


class State:
  """How far a seed has come: on the devices, and counted on the host.

  Attributes:
    batches: number of batches that were taken.
  """

  def __init__(
    self,
    program: Program,
    progress: Any,
    sums: Optional[dict[str, Any]] = None,
  ) -> None:
    """Begins, or goes on.

    Args:
      program: the functions.
      progress: the arrays, on the devices.
      sums: of a checkpoint, as JSON has them; None at the beginning.
    """
    self._program, self._progress = program, progress
    self._sums = program.sums(sums)
    self.batches = int(progress.batches)

  @property
  def epoch(self) -> float:
    """The number of epochs up to now, whole at the end of one."""
    epoch = self.batches / self._program.shapes.steps_an_epoch
    return int(epoch) if epoch.is_integer() else epoch

  @property
  def skipped_in_a_row(self) -> int:
    """Steps that were skipped up to now."""
    return int(self._progress.skipped_in_a_row)

  def take(self, step: Any, batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Takes a step and returns its metrics, without a wait for them."""
    self._progress, self._sums, metrics = step(
      self._progress, self._sums, batch
    )
    self.batches += 1
    # The devices compute on while the host goes on, but for a CPU: there steps
    # in flight divide few threads among them, and their collectives can wait
    # for each other forever.
    if jax.default_backend() == "cpu":
      jax.block_until_ready(self._progress)
    return metrics

  def measure(self, dataset: Dataset, evaluate: Evaluate) -> dict[str, Any]:
    """The means of an epoch, the next learning rate, and the evaluation."""
    program, state = self._program, self._progress.state
    rate = optimizer.learning_rate(program.config, program.steps)
    evaluated = evaluate(state, dataset.x_evaluated, dataset.y_evaluated)
    return {
      "learning_rate": np.asarray(rate(int(state.step))).item(),
      **metrics_lib.finite(means.finish(self._sums)),
      "skipped": int(self._progress.skipped),
      **metrics_lib.finite(
        {f"{dataset.evaluated}_{k}": v for k, v in evaluated.items()}
      ),
    }

  def save(self, checkpoints: Checkpoints, accuracy: Optional[float]) -> None:
    """Begins to write a checkpoint."""
    checkpoints.save(
      self.batches, self._progress, means.to_json(self._sums), accuracy
    )


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

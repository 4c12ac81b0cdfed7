"""One seed on its way: its state on the devices, and counted on the host."""

from typing import Any, Optional

import jax
import numpy as np

from fsam_optax.experiments.train import means
from fsam_optax.experiments.train import metrics as metrics_lib
from fsam_optax.experiments.train import optimizer
from fsam_optax.experiments.train.checkpoints import Checkpoints
from fsam_optax.experiments.train.evaluation import Evaluate
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.rows import Dataset


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
    """The number of epochs up to now, an int at the end of one."""
    number, position = divmod(self.batches, self._program.shapes.steps_an_epoch)
    if position == 0:
      return number
    return self.batches / self._program.shapes.steps_an_epoch

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

"""How far a seed has come: all the arrays that a checkpoint has to hold."""

from typing import Any

from flax import struct
import jax
from jax import numpy as jnp
import numpy as np

import fsam_optax

MEANS = (
  "loss",
  "accuracy",
  "perturbed_loss",
  "sharpness",
  "gradient_norm",
  "perturbation_norm",
)


class RunState(struct.PyTreeNode):
  """The state that is trained, and what is counted beside it.

  Attributes:
    state: the train state; a skipped step leaves it as it was.
    batches: number of batches that were taken, shape ``[]``, int32.
    skipped: steps of this epoch that were skipped, shape ``[]``, int32.
    sums: of each of :data:`MEANS` in this epoch, and their rows, shape ``[2]``.
  """

  state: fsam_optax.TrainState
  batches: jax.Array
  skipped: jax.Array
  sums: dict[str, jax.Array]

  @classmethod
  def begin(cls, state: fsam_optax.TrainState, dtype: Any) -> "RunState":
    sums = {name: jnp.zeros(2, dtype) for name in MEANS}
    return cls(state, jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32), sums)

  def after(
    self,
    state: fsam_optax.TrainState,
    metrics: dict[str, jax.Array],
    rows: int,
    steps_an_epoch: int,
  ) -> "RunState":
    """The progress after a batch; at the start of an epoch sums begin anew."""
    is_first = self.batches % steps_an_epoch == 0
    skipped = metrics["skipped"]

    def add(total, value):
      # Selected, as what a skipped step reports is not finite.
      new = jnp.where(skipped == 0, jnp.stack([rows * value, rows]), 0)
      return jnp.where(is_first, 0, total) + new.astype(total.dtype)

    return RunState(
      state,
      self.batches + 1,
      jnp.where(is_first, 0, self.skipped) + skipped,
      {name: add(total, metrics[name]) for name, total in self.sums.items()},
    )

  def means(self) -> dict[str, float]:
    """The means of the epoch, NaN where every step was skipped."""
    sums = {name: np.asarray(self.sums[name]).tolist() for name in MEANS}
    return {
      name: x / rows if rows else np.nan for name, (x, rows) in sums.items()
    }

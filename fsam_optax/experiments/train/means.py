"""The means of an epoch, summed on the devices as the steps go.

They are no part of the state that is trained, nor of the arrays of a
checkpoint, which keeps them as numbers by name. So a metric that is added or
taken away leaves every checkpoint readable.
"""

from typing import Any, Optional

import jax
from jax import numpy as jnp
import numpy as np

NAMES = (
  "loss",
  "accuracy",
  "perturbed_loss",
  "sharpness",
  "gradient_norm",
  "perturbation_norm",
)

# For each name the sum over the rows and the number of rows, shape `[2]`.
Sums = dict[str, jax.Array]


def add(
  sums: Sums, metrics: dict[str, jax.Array], rows: int, is_first: jax.Array
) -> Sums:
  """Adds the metrics of a step, unless it was skipped.

  Args:
    sums: of the steps before.
    metrics: of this step, means over its rows, with ``skipped``.
    rows: number of rows of this step.
    is_first: whether the step begins an epoch, and so forgets the sums.

  Returns:
    The sums.
  """
  is_taken = metrics["skipped"] == 0

  def add_one(total, value):
    # Selected, as what a skipped step reports is not finite.
    new = jnp.where(is_taken, jnp.stack([rows * value, rows]), 0)
    return jnp.where(is_first, 0, total) + new.astype(total.dtype)

  return {name: add_one(total, metrics[name]) for name, total in sums.items()}


def finish(sums: Sums) -> dict[str, Optional[float]]:
  """The means so far, None where every step was skipped."""
  pairs = {name: np.asarray(sums[name]).tolist() for name in NAMES}
  return {name: s / rows if rows else None for name, (s, rows) in pairs.items()}


def to_json(sums: Sums) -> dict[str, list[float]]:
  """The sums as numbers, from which :func:`from_json` has every bit again."""
  return {name: np.asarray(x).tolist() for name, x in sums.items()}


def from_json(numbers: dict[str, Any], dtype: Any) -> dict[str, np.ndarray]:
  """The sums of a checkpoint, by the names of today.

  Args:
    numbers: from :func:`to_json`, perhaps of a version that reported other
      metrics; an empty dict begins anew.
    dtype: of the sums.

  Returns:
    One sum for each of :data:`NAMES`. A new name begins here, so that its mean
    is over the rest of the epoch; one that is not reported any more is dropped.
  """
  return {name: np.asarray(numbers.get(name, [0, 0]), dtype) for name in NAMES}

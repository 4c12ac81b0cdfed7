"""Means, standard errors and differences over the same seeds."""

from typing import Any, Optional

import numpy as np
from scipy import stats


def standard_error(values: Any) -> Optional[float]:
  """Standard error of the mean; None for fewer than two values."""
  if len(values) < 2:
    return None
  return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def finite(values: Any) -> np.ndarray:
  """The values that are finite, float64; None is not."""
  values = np.asarray(values, np.float64)
  return values[np.isfinite(values)]


def mean_and_error(values: Any) -> tuple[Optional[float], Optional[float]]:
  """Mean and standard error of the finite values; None where there are none."""
  values = finite(values)
  if not len(values):
    return None, None
  return float(values.mean()), standard_error(values)


def collapsed(values: Any) -> int:
  """How many accuracies are more than ten points below the median.

  A few such runs move a mean by more than its error.
  """
  values = finite(values)
  return int(np.sum(values < np.median(values) - 10)) if len(values) else 0


def paired(first: Any, second: Any) -> dict[str, Optional[float]]:
  """The difference between two ways to train, over the same seeds.

  A seed gives both ways the same split, noise, initialization and batches. What
  makes it easy or hard cancels in the difference, whose error is a fraction of
  that of the means.

  Args:
    first: one value a seed, not finite where its run diverged.
    second: as many, in the same order of seeds.

  Returns:
    Of the seeds where both are finite: ``mean`` of ``first`` minus ``second``,
    its ``standard_error``, the ``median``, at how many ``seeds`` the first is
    ``above`` the second, and the two-sided ``p_value`` of the paired t-test.
    None where one is not defined, as the last where all differences are equal.
  """
  first, second = np.asarray(first, float), np.asarray(second, float)
  both = np.isfinite(first) & np.isfinite(second)
  if not both.any():
    nothing = dict.fromkeys(("mean", "standard_error", "median", "p_value"))
    return {**nothing, "above": 0, "seeds": 0}
  difference = first[both] - second[both]
  error = standard_error(difference)
  p_value = None
  # Equal differences have an error of 0, or of a rounding.
  if error is not None and np.ptp(difference) > 1e-9:
    p_value = float(stats.ttest_rel(first[both], second[both]).pvalue)
  return {
    "mean": float(np.mean(difference)),
    "standard_error": error,
    "median": float(np.median(difference)),
    "above": int(np.sum(difference > 0)),
    "seeds": len(difference),
    "p_value": p_value,
  }

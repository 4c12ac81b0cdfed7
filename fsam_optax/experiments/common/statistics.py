"""Means and standard errors over seeds."""

from typing import Any, Optional

import numpy as np


def finite(values: Any) -> np.ndarray:
  """The values that are finite, float64; None is not."""
  values = np.asarray(values, np.float64)
  return values[np.isfinite(values)]


def mean_and_error(values: Any) -> tuple[Optional[float], Optional[float]]:
  """Mean and standard error of the finite values.

  The mean is None for no value, the error for fewer than two.
  """
  values, error = finite(values), None
  if len(values) > 1:
    error = float(np.std(values, ddof=1) / np.sqrt(len(values)))
  return float(values.mean()) if len(values) else None, error


def collapsed(values: Any) -> int:
  """How many accuracies are more than ten points below the median.

  A few such runs move a mean by more than its error.
  """
  values = finite(values)
  return int(np.sum(values < np.median(values) - 10)) if len(values) else 0

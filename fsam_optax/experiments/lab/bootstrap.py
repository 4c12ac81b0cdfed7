"""The error that a search for hyperparameters brings, by a bootstrap.

Seeds decide between neighboring points by chance. What other seeds would have
chosen says how much that moves what is reported.
"""

from typing import NamedTuple

import numpy as np

_DRAWS, _SEED = 2000, 0


def resamples(number: int, use: int = 0) -> np.ndarray:
  """Draws of seeds with replacement, shape ``[D, number]``.

  For each use they are always the same ones, so that arms stay paired by their
  seeds.
  """
  rng = np.random.default_rng(_SEED + use)
  return rng.integers(0, number, (_DRAWS, number))


def choices(accuracy: np.ndarray, seeds: np.ndarray) -> np.ndarray:
  """The point that each draw of seeds ``[D, S]`` would have chosen, ``[D]``."""
  return np.argmax(accuracy[:, seeds].mean(axis=2), axis=0)


class Tested(NamedTuple):
  """The candidates of a search, on seeds that chose nothing.

  Attributes:
    validation_accuracy: by the seeds that choose, shape ``[C, S]``.
    test_accuracy: by the seeds to report, shape ``[C, T]``; NaN where a run
      diverged.
  """

  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray


def error_with_search(first: Tested, second: Tested) -> float:
  """Standard error of a paired difference, the search's included.

  In each draw of a bootstrap both arms take their best point by other seeds
  that choose, and are reported by other seeds.
  """
  numbers = [accuracy.shape[1] for accuracy in first]
  choosing = resamples(numbers[0])
  # Others than those that choose, where there are as many.
  testing = resamples(numbers[1], use=int(numbers[0] == numbers[1]))
  means = []
  for tested in (first, second):
    chosen = choices(tested.validation_accuracy, choosing)
    means.append(tested.test_accuracy[chosen[:, None], testing])
  return float(np.nanstd(np.nanmean(means[0] - means[1], axis=1), ddof=1))

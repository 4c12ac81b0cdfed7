"""The error that a search for hyperparameters brings, by a bootstrap.

Seeds decide between neighboring points by chance. What other seeds would have
chosen says how much that moves what is reported.
"""

from typing import Any, Mapping, Sequence

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


Candidates = Sequence[Mapping[str, Any]]
"""Of a search: each has the ``"validation_accuracy"`` of seeds that choose, and
the ``"test_accuracy"`` of those to report, None where a run diverged."""


def error_with_search(first: Candidates, second: Candidates) -> float:
  """Standard error of a paired difference, the search's included.

  In each draw of a bootstrap both arms take their best point by other seeds
  that choose, and are reported by other seeds.
  """
  means = []
  for candidates in (first, second):
    validation, test = (
      np.array([x[what] for x in candidates], float)
      for what in ("validation_accuracy", "test_accuracy")
    )
    numbers = validation.shape[1], test.shape[1]
    chosen = choices(validation, resamples(numbers[0]))
    # Others than those that choose, where there are as many.
    testing = resamples(numbers[1], use=int(numbers[0] == numbers[1]))
    means.append(test[chosen[:, None], testing])
  return float(np.nanstd(np.nanmean(means[0] - means[1], axis=1), ddof=1))

"""Wrong labels: which rows get one, and which."""

from typing import Optional

import numpy as np

KINDS = ("symmetric", "uniform", "asymmetric")
"""What ``--label-noise-kind`` takes, in every command."""


def corrupt(
  labels: np.ndarray,
  classes: int,
  fraction: float,
  kind: str,
  *,
  rng: np.random.Generator,
  targets: Optional[np.ndarray] = None,
) -> np.ndarray:
  """Replaces a fraction of the labels.

  Args:
    labels: shape ``[N]``, integers in ``[0, classes)``.
    classes: number of classes.
    fraction: of the rows, rounded to whole ones.
    kind: ``"symmetric"``: by one of the other classes; ``"uniform"``: by one of
      all classes, so that one in ``classes`` stays right, as in the script of
      the authors; ``"asymmetric"``: by the class that ``targets`` has for it.
    rng: draws the rows and their labels.
    targets: shape ``[classes]``; None for the next class, the first after the
      last.
  """
  labels = labels.copy()
  rows = rng.choice(len(labels), round(fraction * len(labels)), replace=False)
  if kind == "symmetric":
    shift = rng.integers(1, classes, size=len(rows))
    labels[rows] = (labels[rows] + shift) % classes
  elif kind == "uniform":
    labels[rows] = rng.integers(0, classes, len(rows))
  else:
    if targets is None:
      targets = np.roll(np.arange(classes), -1)
    labels[rows] = targets[labels[rows]]
  return labels

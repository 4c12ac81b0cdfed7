"""Wrong labels, as the experiments of the paper have them."""

from typing import Optional

import numpy as np

KINDS = ("symmetric", "asymmetric")


def corrupt(
  labels: np.ndarray,
  classes: int,
  share: float,
  kind: str,
  seed: int,
  targets: Optional[np.ndarray] = None,
) -> np.ndarray:
  """Replaces a share of the labels.

  Examples:
    >>> import numpy as np
    >>> labels = np.arange(10) % 5
    >>> noisy = corrupt(labels, 5, 0.4, "asymmetric", seed=0)
    >>> print((noisy != labels).sum(), ((noisy - labels) % 5).max())
    4 1

  Args:
    labels: shape ``[N]``, integers in ``[0, classes)``.
    classes: number of classes.
    share: of the labels that are replaced, in ``[0, 1]``, rounded to whole
      rows.
    kind: ``"symmetric"``: by one drawn from all classes, so that one of
      ``classes`` stays right, as in the authors' code; ``"asymmetric"``: by
      the class that ``targets`` has for it.
    seed: of the draws.
    targets: shape ``[classes]``; None for the next class, the first after the
      last.

  Returns:
    The labels, a copy.
  """
  rng = np.random.default_rng((seed, 1))
  labels = labels.copy()
  rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
  if kind == "symmetric":
    labels[rows] = rng.integers(0, classes, len(rows))
    return labels
  if targets is None:
    targets = np.roll(np.arange(classes), -1)
  labels[rows] = targets[labels[rows]]
  return labels

"""The optimizers that the experiments compare, by name."""

from typing import Callable, NamedTuple, Optional

import optax

import fsam_optax


class Optimizer(NamedTuple):
  """A way to train: its name in prose and its ascent.

  The ascent is made from the options of
  :func:`fsam_optax.friendly_perturbation`; None is none.
  """

  label: str
  perturbation: Optional[Callable[..., optax.GradientTransformation]] = None


def _sam(rho, *, adaptive=False, mask=None, **of_the_average):
  del of_the_average
  return fsam_optax.sam_perturbation(rho, adaptive=adaptive, mask=mask)


REGISTRY = {
  "sgd": Optimizer("SGD"),
  "sam": Optimizer("SAM", _sam),
  "fsam": Optimizer("F-SAM", fsam_optax.friendly_perturbation),
}
NAMES = tuple(REGISTRY)
ASCENDING = tuple(name for name, x in REGISTRY.items() if x.perturbation)

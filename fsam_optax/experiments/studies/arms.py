"""What a study works on, and the ways to train that it compares: its arms."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import optax

import fsam_optax
from fsam_optax.experiments.common.progress import Advance
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import splits

LMBDA = 0.9
UNTUNED_DECAY = 5e-4  # Of the studies that do not search it.
RATES = (0.0075, 0.015, 0.03)
RADII = (0.15, 0.25, 0.4, 0.6)
# Of SGD alone, as many as the points of the others' grids.
SGD_RATES = tuple(0.0005 * 1.5**i for i in range(12))


class Context(NamedTuple):
  """What a study works on.

  Attributes:
    pool: the data set.
    model: name of the network.
    label_noise: fraction of the training labels that are replaced.
    label_noise_kind: by what they are replaced.
    epochs: passes over the training rows.
    batch_size: rows a step.
    search_seeds: to choose learning rates and radii by, on validation rows.
    seeds: to report; none of them chose anything.
    is_quick: whether to do the least that shows that the study runs.
    progress: opens a progress bar of a title and a number of steps.
  """

  pool: splits.Pool
  model: str
  label_noise: float
  label_noise_kind: str
  epochs: int
  batch_size: int
  search_seeds: Sequence[int]
  seeds: Sequence[int]
  is_quick: bool
  progress: Callable[[str, int], Advance]


class Arm(NamedTuple):
  """A way to train, and where its hyperparameters are searched.

  Attributes:
    perturbation: from a radius; None for SGD.
    radii: to try with each learning rate; 0 alone for SGD.
    rates: learning rates to try.
    decays: weight decays to try.
  """

  perturbation: Optional[Callable[[Any], optax.GradientTransformation]]
  radii: tuple[float, ...] = RADII
  rates: tuple[float, ...] = RATES
  decays: tuple[float, ...] = (UNTUNED_DECAY,)

  @property
  def grid(self) -> search.Grid:
    """Where its search begins."""
    return search.Grid(self.rates, self.radii, self.decays)


def fsam(rho: Any, sigma: float = 1.0, lmbda: float = LMBDA):
  """The ascent of F-SAM."""
  return fsam_optax.friendly_perturbation(rho, sigma, lmbda)


SGD = Arm(None, radii=(0.0,), rates=SGD_RATES)
SAM = Arm(fsam_optax.sam_perturbation)
FSAM = Arm(fsam, radii=(0.3, 0.45, 0.65, 0.95))

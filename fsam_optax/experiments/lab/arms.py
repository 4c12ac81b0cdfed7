"""The ways to train that are compared: arms, as data."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
import functools
from typing import Any, NamedTuple, Optional

import optax

import fsam_optax
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.lab.search import Grid

LMBDA = 0.9
UNTUNED_DECAY = 5e-4  # Of the studies that do not search it.
RATES = (0.0075, 0.015, 0.03)
RADII = (0.15, 0.25, 0.4, 0.6)
# Of SGD alone, as many as the points of the others' grids.
SGD_RATES = tuple(0.0005 * 1.5**i for i in range(12))


class Arm(NamedTuple):
  """A way to train, and where its hyperparameters are searched.

  Attributes:
    perturbation: from a radius; None for SGD.
    radii: to try with each learning rate; 0 alone for SGD.
    rates: learning rates to try.
    decays: weight decays to try.
    options: of the step.
    make_step: :func:`fsam_optax.make_train_step`, or what takes its arguments
      and returns such a step.
    epochs: how many times the epochs of the others.
    last: fraction of the training, at its end, in which it ascends.
    sees_more: whether a batch holds, beside its ``"x"`` and ``"y"``, such a
      pair under ``"whole"``, all training rows, one under ``"other"``, as many
      rows of another batch, and under ``"rate"`` the learning rate.
    gradients: evaluations a step, in gradients of the whole batch, those of
      twice the epochs both steps'; None where no table says it.
    watch: from the perturbation's last state, leaves of shape ``[R, ...]``, to
      what the row of the ``R`` runs says of it.
  """

  perturbation: Optional[Callable[[Any], optax.GradientTransformation]]
  radii: tuple[float, ...] = RADII
  rates: tuple[float, ...] = RATES
  decays: tuple[float, ...] = (UNTUNED_DECAY,)
  options: Mapping[str, Any] = {}
  make_step: Callable[..., Any] = fsam_optax.make_train_step
  epochs: int = 1
  last: float = 1.0
  sees_more: bool = False
  gradients: Optional[float] = None
  watch: Callable[[Any], dict[str, Any]] = lambda state: {}

  @property
  def grid(self) -> Grid:
    """Where its search begins."""
    return Grid(self.rates, self.radii, self.decays)

  def step(self, loss_fn: Callable[..., Any], steps: int) -> Any:
    """Its step, in a training of so many."""
    options = dict(self.options)
    if self.last < 1:
      options["start"] = round((1 - self.last) * steps)
    return self.make_step(
      loss_fn, skip_nonfinite=False, metrics=(), jit=False, **options
    )


def fsam(rho: Any, sigma: float = 1.0, lmbda: float = LMBDA):
  """The ascent of F-SAM."""
  return fsam_optax.friendly_perturbation(rho, sigma, lmbda)


SGD = Arm(None, radii=(0.0,), rates=SGD_RATES)
SAM = Arm(fsam_optax.sam_perturbation)
FSAM = Arm(fsam, radii=(0.3, 0.45, 0.65, 0.95))


def of_optimizers(
  names: Iterable[str], sigma: float = 1.0, lmbda: float = LMBDA
) -> dict[str, Arm]:
  """The optimizers of these names as arms."""

  def arm(name: str) -> Arm:
    if name not in optimizers.ASCENDING:
      return Arm(None)
    ascent: Any = functools.partial(
      optimizers.perturbation, name, sigma=sigma, lmbda=lmbda
    )
    return Arm(lambda rho: ascent(rho=rho))

  return {name: arm(name) for name in names}

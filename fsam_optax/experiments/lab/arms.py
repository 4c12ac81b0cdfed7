"""The ways to train that are compared: arms, as data."""

import functools
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional

import optax

import fsam_optax
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.lab.search import Grid
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.search import around

LMBDA = 0.9
MOMENTUM = 0.9  # Of the optimizers.


class Arm(NamedTuple):
  """A way to train, and where the search for its hyperparameters begins.

  Attributes:
    perturbation: from a radius; None for SGD.
    like: the optimizer around whose values of the setting the search begins.
    unit: of the radius there, in those of that optimizer.
    options: of the step.
    make_step: :func:`fsam_optax.make_train_step`, or what takes its arguments
      and returns such a step.
    epochs: how many times the epochs of the others.
    last: fraction of the training, at its end, in which it ascends.
    sees_more: whether a batch holds two more pairs of ``"x"`` and ``"y"``:
      ``"whole"``, all training rows, and ``"other"``, those of another batch.
    gradients: cost of a step, in gradients of the whole batch; None where no
      table says it.
    watch: from the perturbation's last state, leaves of shape ``[R, ...]``, to
      what the row of the ``R`` runs says of it.
  """

  perturbation: Optional[Callable[[Any], optax.GradientTransformation]]
  like: str = "fsam"
  unit: float = 1.0
  options: Mapping[str, Any] = {}
  make_step: Callable[..., Any] = fsam_optax.make_train_step
  epochs: int = 1
  last: float = 1.0
  sees_more: bool = False
  gradients: Optional[float] = None
  watch: Callable[[Any], dict[str, Any]] = lambda state: {}

  def grid(self, best: Mapping[str, Point]) -> Grid:
    """27 points around the best of each optimizer, in steps of a root of two.

    SGD has no radius, and so more learning rates.
    """
    rate, rho, decay = best[self.like]
    if self.perturbation is None:
      return Grid(around(rate, 9), (0.0,), around(decay, 3))
    return Grid(around(rate, 3), around(self.unit * rho, 3), around(decay, 3))

  def step(self, loss_fn: Callable[..., Any], steps: int) -> Any:
    """Its step, in a training of so many."""
    options = dict(self.options)
    if self.last < 1:
      options["start"] = round((1 - self.last) * steps)
    return self.make_step(
      loss_fn, skip_nonfinite=False, metrics=(), jit=False, **options
    )


fsam = functools.partial(fsam_optax.friendly_perturbation, lmbda=LMBDA)
SGD = Arm(None, "sgd")
SAM = Arm(fsam_optax.sam_perturbation, "sam")
FSAM = Arm(fsam)
# Its average is the optimizer's momentum.
FSAM_MOMENTUM = Arm(
  functools.partial(fsam, lmbda=MOMENTUM, average="optimizer")
)


def of_optimizers(
  names: Iterable[str], sigma: float, lmbda: float
) -> dict[str, Arm]:
  """The optimizers of these names as arms."""
  average = {"sigma": sigma, "lmbda": lmbda}
  ascents = {name: optimizers.REGISTRY[name].perturbation for name in names}
  return {
    name: Arm(functools.partial(ascent, **average)) if ascent else SGD
    for name, ascent in ascents.items()
  }

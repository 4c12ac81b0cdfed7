"""The optimizers that the experiments compare, by name."""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import optax

import fsam_optax


class Optimizer(NamedTuple):
  """A way to train: the base optimizer behind an ascent, or without one.

  Attributes:
    label: its name as prose writes it.
    color: of its lines in figures.
    perturbation: makes the ascent from the options of :func:`perturbation`;
      None where there is none.
  """

  label: str
  color: str
  perturbation: Optional[Callable[..., optax.GradientTransformation]] = None


def _sam(*, rho, adaptive, mask, eta, **of_the_average):
  del of_the_average  # SAM has none.
  return fsam_optax.sam_perturbation(rho, adaptive=adaptive, mask=mask, eta=eta)


def _fsam(*, rho, sigma, lmbda, **options):
  return fsam_optax.friendly_perturbation(rho, sigma, lmbda, **options)


REGISTRY = {
  "sgd": Optimizer("SGD", "#7f7f7f"),
  "sam": Optimizer("SAM", "#0072b2", _sam),
  "fsam": Optimizer("F-SAM", "#d55e00", _fsam),
}
NAMES = tuple(REGISTRY)
ASCENDING = tuple(name for name, x in REGISTRY.items() if x.perturbation)


def perturbation(
  name: str,
  *,
  rho: optax.ScalarOrSchedule,
  sigma: optax.ScalarOrSchedule = 1.0,
  lmbda: optax.ScalarOrSchedule = 0.9,
  adaptive: bool = False,
  mask: Any = None,
  order: Any = "official",
  accumulator_dtype: Any = None,
  average: Any = "own",
  eta: float = 0.0,
) -> Optional[optax.GradientTransformation]:
  """The ascent of an optimizer.

  Args:
    name: one of :data:`NAMES`.
    rho: radius.
    sigma: fraction of the gradient average that F-SAM subtracts.
    lmbda: decay of that average.
    adaptive: whether the radius is in the metric of ASAM.
    mask: which leaves are perturbed, as :func:`optax.masked` takes it.
    order: ``"official"`` or ``"paper"``, of the average and the subtraction.
    accumulator_dtype: of the average; None for that of the gradient.
    average: ``"own"`` or ``"optimizer"``.
    eta: added to the metric of ASAM.

  Returns:
    The transformation, None for ``"sgd"``. SAM ignores what speaks of the
    average.
  """
  make = REGISTRY[name].perturbation
  if make is None:
    return None
  return make(
    rho=rho,
    sigma=sigma,
    lmbda=lmbda,
    adaptive=adaptive,
    mask=mask,
    order=order,
    accumulator_dtype=accumulator_dtype,
    average=average,
    eta=eta,
  )


def label(name: str) -> str:
  """The name of an optimizer as prose writes it."""
  return REGISTRY[name].label

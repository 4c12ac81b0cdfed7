"""The study of the metric: F-SAM against SAM in the Euclidean and in ASAM's."""

import functools

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.lab.study import side_by_side

# As many points as the other arms' grids.
_RADII = (1.5, 3.0, 6.0)
_RATES = (0.004, 0.008, 0.016, 0.032)
_ARMS = {
  "SAM": arms.SAM,
  "F-SAM": arms.FSAM,
  "ASAM": arms.Arm(
    functools.partial(fsam_optax.sam_perturbation, adaptive=True),
    _RADII,
    _RATES,
  ),
  "F-ASAM": arms.Arm(
    functools.partial(
      fsam_optax.friendly_perturbation, lmbda=arms.LMBDA, adaptive=True
    ),
    _RADII,
    _RATES,
  ),
}

STUDY = Study(
  "metric",
  "does it help in the metric of ASAM, too?",
  side_by_side(("SAM", "ASAM")),
  _ARMS,
)

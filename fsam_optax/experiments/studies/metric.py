"""The study of the metric: F-SAM against SAM in the Euclidean and in ASAM's."""

import functools
from typing import Any

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

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


def _run(lab: Lab) -> dict[str, Any]:
  results = lab.results()
  return {
    "results": results,
    "tables": [paired_report.arms_table(results, ("SAM", "ASAM"))],
    "panels": [paired_report.bars(results)],
  }


STUDY = Study("metric", "does it help in the metric of ASAM, too?", _run, _ARMS)

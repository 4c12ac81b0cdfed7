"""The study of the gradient's parts as ascent directions, with controls."""

import functools
from typing import Any

import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import ascents

_RHO = 0.2  # Of the ascent and of the worst direction.
_RANDOM_RHO = 2.0


def _along(direction: Any, radii: Any, rates: Any = arms.RATES, **options: Any):
  """The arm that ascends along a direction."""
  return arms.Arm(
    lambda rho: ascents.along(direction(**options), rho),
    radii,
    rates,
    make_step=ascents.step_on_other_rows,
    sees_more=True,
  )


_ARMS = {
  "SGD": arms.SGD,
  "SAM": arms.SAM,
  "full gradient": _along(
    ascents.full_gradient,
    (0.25, 0.4, 0.6, 0.95),
    rates=(0.00375, 0.0075, 0.015),
  ),
  "noise": _along(ascents.gradient_noise, arms.FSAM.radii),
  "F-SAM": arms.FSAM,
  "EMA": _along(ascents.gradient_ema, arms.RADII, lmbda=arms.LMBDA),
  "random": _along(
    ascents.random_direction,
    (7.0, 11.0, 17.0, 26.0),
    rates=(0.015, 0.03, 0.06),
  ),
  "other batch": _along(ascents.other_gradient, (0.4, 0.6, 0.95, 1.5)),
}


def _run(lab: Lab) -> dict[str, Any]:
  results = lab.results(
    measure=functools.partial(
      _measures, rows=lab.batch_size, samples=2 if lab.is_quick else 30
    )
  )
  measures = {name: row["measures"] for name, row in results.items()}
  columns = list(measures["SGD"])
  rows = [
    [name, *(paired_report.number(found[c]) for c in columns)]
    for name, found in measures.items()
  ]
  return {
    "results": results,
    "tables": [
      paired_report.arms_table(results, ["F-SAM"], "ascent along"),
      {"header": ["ascent along", *columns], "rows": rows},
    ],
    "panels": [
      paired_report.bars(results),
      *(
        paired_report.panel(
          "",
          [
            paired_report.line(
              "", measures, [found[column] for found in measures.values()]
            )
          ],
          column,
        )
        for column in columns[:3]
      ),
    ],
  }


def _measures(model, key, *, rows: int, samples: int) -> dict[str, Any]:
  """Sharpness on all training rows."""
  noise = functools.cache(lambda: sharpness.gradient_noise(*model, rows=rows))
  rise = lambda measure, **options: (
    lambda: float(measure(*model, **options).mean)
  )
  return {
    f"rise along the gradient, {_RHO}": rise(
      sharpness.ascent_sharpness, rho=_RHO
    ),
    f"worst rise, {_RHO}": rise(
      sharpness.worst_sharpness, rho=_RHO, key=key, steps=10
    ),
    f"mean rise, {_RANDOM_RHO:g}": rise(
      sharpness.average_sharpness, rho=_RANDOM_RHO, key=key, samples=samples
    ),
    "full gradient's norm": lambda: float(noise().full_norm),
    "cosine of batch and full gradient": lambda: float(
      np.mean(noise().batch_cosine)
    ),
  }


STUDY = Study(
  "decomposition",
  "which part of the gradient is a good ascent direction?",
  _run,
  _ARMS,
)

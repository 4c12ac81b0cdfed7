"""The study of curvature: how flat the loss is where SGD, SAM and F-SAM end.

Each at its tuned values, on all training rows.
"""

import functools
from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SGD": arms.SGD, "SAM": arms.SAM, "F-SAM": arms.FSAM}
_RHO, _RANDOM_RHO, _MOST_SEEDS = 0.1, 1.0, 8


def _run(lab: Lab) -> dict[str, Any]:
  if len(lab.seeds) > _MOST_SEEDS:
    raise FlagError("--seeds", f"must be at most {_MOST_SEEDS} here")
  measure = functools.partial(
    _measures,
    matvecs=10 if lab.is_quick else 60,
    samples=2 if lab.is_quick else 30,
  )
  results, panels = {}, []
  for name, arm in _ARMS.items():
    point = lab.best[arm.like]
    row = lab.run(name, point, lab.seeds, "measured", measure=measure)
    measures = dict(row["measures"])
    density = measures.pop("density", None)
    if density is None:
      raise ValueError(f"every run of {name} diverged: nothing to measure")
    results[name] = {**row, "measures": measures}
    look = {"title": name, "yscale": "log"}
    line = _density(density)
    panels.append(figures.panel("eigenvalue", [line], "density", **look))
  columns = list(results["SGD"]["measures"])
  rows = [
    [name, *(paired_report.number(row["measures"][c]) for c in columns)]
    for name, row in results.items()
  ]
  tables = [{"header": ["", *columns], "rows": rows}]
  return {"results": results, "tables": tables, "panels": panels}


def _measures(
  model: Any, key: jax.Array, *, matvecs: int, samples: int
) -> dict[str, Any]:
  lanczos = {"key": key, "num_matvecs": matvecs}
  top = sharpness.hessian_eigenvalues(*model, num=5, **lanczos).tolist()
  trace = sharpness.hessian_trace(*model, key=key, samples=20)
  density = sharpness.hessian_density(*model, samples=2, **lanczos)
  rise = lambda measure, **options: float(measure(*model, **options).mean)
  return {
    "largest eigenvalue": top[0],
    "fifth": top[4],
    "trace": float(trace[0]),
    f"rise along the gradient, {_RHO}": rise(
      sharpness.ascent_sharpness, rho=_RHO
    ),
    f"worst rise, {_RHO}": rise(
      sharpness.worst_sharpness, rho=_RHO, key=key, steps=10
    ),
    f"mean rise, {_RANDOM_RHO:g}": rise(
      sharpness.average_sharpness, rho=_RANDOM_RHO, key=key, samples=samples
    ),
    "density": [x.tolist() for x in density],
  }


def _density(measured: list[Any]) -> dict[str, Any]:
  density = [sharpness.SpectralDensity(*map(np.array, x)) for x in measured]
  largest = max(float(np.max(d.nodes)) for d in density)
  smallest = min(float(np.min(d.nodes)) for d in density)
  grid = np.linspace(min(smallest, 0) - 0.1, largest * 1.1 + 0.1, 200)
  smooth = [d.at(grid, width=(grid[-1] - grid[0]) / 50) for d in density]
  return figures.line("", grid.tolist(), np.maximum(smooth, 1e-7).T)


STUDY = Study(
  "curvature", "how curved is the loss where it ends?", _ARMS, run=_run, seeds=8
)

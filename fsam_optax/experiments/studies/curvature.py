"""The study of curvature: the Hessian where SGD, SAM and F-SAM end."""

from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SGD": arms.SGD, "SAM": arms.SAM, "F-SAM": arms.FSAM}
_EIGENVALUES = 5


def _run(lab: Lab) -> dict[str, Any]:
  matvecs = 10 if lab.is_quick else 60
  results = lab.results(
    measure=lambda models, advance: _measure(models, advance, matvecs)
  )
  shown = {"largest eigenvalue": 0, "second": 1, "fifth": 4}
  rows = [
    [
      name,
      paired_report.accuracy(row["test_accuracy"]),
      *(
        paired_report.number([x[i] for x in row["eigenvalues"]])
        for i in shown.values()
      ),
      paired_report.number(row["trace"]),
    ]
    for name, row in results.items()
  ]
  header = ["", "test accuracy %", *shown, "trace"]
  return {
    "results": results,
    "tables": [{"header": header, "rows": rows}],
    "panels": [
      paired_report.panel(
        "eigenvalue", [row["density"]], "density", is_log_y=True, title=name
      )
      for name, row in results.items()
      if row["density"]
    ],
  }


def _measure(models: list[Any], advance: Any, matvecs: int) -> dict[str, Any]:
  """Eigenvalues, trace and the density of the Hessian of each model."""
  top, trace, density = [], [], []
  for run, model in enumerate(models):
    key = jax.random.key(run)
    try:
      eigenvalues = sharpness.hessian_eigenvalues(
        *model, num=_EIGENVALUES, key=key, num_matvecs=matvecs
      )
      total, _ = sharpness.hessian_trace(*model, key=key, samples=20)
      density.append(
        sharpness.hessian_density(
          *model, key=key, num_matvecs=matvecs, samples=2
        )
      )
      top.append(eigenvalues.tolist())
      trace.append(float(total))
    except ValueError:  # Its parameters are not finite: it has diverged.
      top.append([None] * _EIGENVALUES)
      trace.append(None)
    advance()
  line = _density(density) if density else None
  return {"eigenvalues": top, "trace": trace, "density": line}


def _density(density: list[Any]) -> dict[str, Any]:
  largest = max(float(np.max(d.nodes)) for d in density)
  smallest = min(float(np.min(d.nodes)) for d in density)
  grid = np.linspace(min(smallest, 0) - 0.1, largest * 1.1 + 0.1, 200)
  smooth = [d.at(grid, width=(grid[-1] - grid[0]) / 50) for d in density]
  return paired_report.line("", grid.tolist(), np.maximum(smooth, 1e-7).T)


STUDY = Study("curvature", "how curved is the loss where it ends?", _run, _ARMS)

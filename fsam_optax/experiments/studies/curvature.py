"""The study of curvature: the Hessian where SGD, SAM and F-SAM end."""

import functools
from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SGD": arms.SGD, "SAM": arms.SAM, "F-SAM": arms.FSAM}


def _run(lab: Lab) -> dict[str, Any]:
  measure = functools.partial(_measures, matvecs=10 if lab.is_quick else 60)
  results = lab.results(measure=measure)
  shown = {"largest eigenvalue": 0, "second": 1, "fifth": 4}
  rows, panels = [], []
  for name, row in results.items():
    measures = row["measures"]
    of = lambda i, x=measures: [top and top[i] for top in x["eigenvalues"]]
    cells = (of(i) for i in shown.values())
    rows.append(
      [
        name,
        paired_report.accuracy(row["test_accuracy"]),
        *map(paired_report.number, (*cells, measures["trace"])),
      ]
    )
    if lines := _density(measures["density"]):
      panel = paired_report.panel("eigenvalue", lines, "density", title=name)
      panels.append({**panel, "is_log_y": True})
  header = ["", "test accuracy %", *shown, "trace"]
  tables = [{"header": header, "rows": rows}]
  return {"results": results, "tables": tables, "panels": panels}


def _measures(model: Any, key: jax.Array, *, matvecs: int) -> dict[str, Any]:
  """Eigenvalues, trace and the density of the Hessian."""
  lanczos = {"key": key, "num_matvecs": matvecs}
  top = lambda: sharpness.hessian_eigenvalues(*model, num=5, **lanczos)
  trace = lambda: sharpness.hessian_trace(*model, key=key, samples=20)
  density = lambda: sharpness.hessian_density(*model, samples=2, **lanczos)
  return {
    "eigenvalues": lambda: top().tolist(),
    "trace": lambda: float(trace()[0]),
    "density": lambda: [x.tolist() for x in density()],
  }


def _density(measured: list[Any]) -> list[dict[str, Any]]:
  """The mean density of the runs as a line, where there are any."""
  found = [x for x in measured if x is not None]
  if not found:
    return []
  density = [sharpness.SpectralDensity(*map(np.array, x)) for x in found]
  largest = max(float(np.max(d.nodes)) for d in density)
  smallest = min(float(np.min(d.nodes)) for d in density)
  grid = np.linspace(min(smallest, 0) - 0.1, largest * 1.1 + 0.1, 200)
  smooth = [d.at(grid, width=(grid[-1] - grid[0]) / 50) for d in density]
  return [paired_report.line("", grid.tolist(), np.maximum(smooth, 1e-7).T)]


STUDY = Study("curvature", "how curved is the loss where it ends?", _run, _ARMS)

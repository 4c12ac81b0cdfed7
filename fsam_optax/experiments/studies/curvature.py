"""The study of curvature: the Hessian where SGD, SAM and F-SAM end."""

from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

_ARMS = {"SGD": arms_lib.SGD, "SAM": arms_lib.SAM, "F-SAM": arms_lib.FSAM}
_MEASURED_SEEDS = 8
_EIGENVALUES = 5


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains each arm, and measures the Hessian's spectrum at its solutions.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  contest = contest_lib.Contest(context, _ARMS)
  results, densities = {}, {}
  for name in _ARMS:
    runs, results[name] = contest.test(name, contest.choose(name))
    spectrum, densities[name] = _measure(contest, name, runs, context)
    results[name] |= spectrum
  number = min(_MEASURED_SEEDS, len(context.seeds))
  return {
    "results": results,
    "tables": [_table(results)],
    "panels": [
      _panel(name, found) for name, found in densities.items() if found
    ],
    "config": {"measured_seeds": list(context.seeds)[:number]},
  }


def _measure(contest, name, runs, context) -> tuple[dict[str, Any], list[Any]]:
  """Eigenvalues and trace of some runs, and the densities of what is finite."""
  number = min(_MEASURED_SEEDS, len(context.seeds))
  matvecs = 10 if context.is_quick else 60
  top, trace, density = [], [], []
  advance = context.progress(f"{name}, Hessian", number)
  for run in range(number):
    loss_fn, params, rows = contest.loss_and_data(runs, run, context.seeds)
    key = jax.random.key(run)
    try:
      eigenvalues = sharpness.hessian_eigenvalues(
        loss_fn, params, rows, _EIGENVALUES, key=key, num_matvecs=matvecs
      )
      total, _ = sharpness.hessian_trace(
        loss_fn, params, rows, key=key, samples=20
      )
      density.append(
        sharpness.hessian_density(
          loss_fn, params, rows, key=key, num_matvecs=matvecs, samples=2
        )
      )
    except ValueError:  # Its parameters are not finite: it has diverged.
      eigenvalues, total = np.full(_EIGENVALUES, np.nan), np.nan
    top.append(eigenvalues)
    trace.append(total)
    advance()
  return {"eigenvalues": np.array(top).tolist(), "trace": trace}, density


def _panel(name: str, density: list[Any]) -> dict[str, Any]:
  largest = max(float(np.max(d.nodes)) for d in density)
  smallest = min(float(np.min(d.nodes)) for d in density)
  grid = np.linspace(min(smallest, 0) - 0.1, largest * 1.1 + 0.1, 200)
  smooth = [d.at(grid, width=(grid[-1] - grid[0]) / 50) for d in density]
  return {
    "xlabel": "eigenvalue",
    "ylabel": "density",
    "is_log_y": True,
    "title": name,
    "series": [report.line(name, grid.tolist(), np.maximum(smooth, 1e-7).T)],
  }


def _table(results: dict[str, Any]) -> dict[str, Any]:
  rows = [
    [
      name,
      report.accuracy(result["test_accuracy"]),
      *(
        report.number(np.array(result["eigenvalues"])[:, i]) for i in (0, 1, 4)
      ),
      report.number(result["trace"]),
    ]
    for name, result in results.items()
  ]
  header = [
    "",
    "test accuracy %",
    "largest eigenvalue",
    "second",
    "fifth",
    "trace",
  ]
  return {"header": header, "rows": rows}


ENTRY = entry.Study("curvature", "how curved is the loss where it ends?", run)

"""Studies that measure the trained models: decomposition and curvature."""

import functools
from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments import directions
from fsam_optax.experiments.studies import bench as bench_lib

_MEASURED_SEEDS = 8
_RHO = 0.2  # Of the ascent and of the worst direction.
_RANDOM_RHO = 2.0


def _along(direction: Any, **options: Any):
  """The arm that ascends along a direction."""
  return lambda rho: directions.along(direction(**options), rho)


ARMS = {
  "SGD": bench_lib.SGD,
  "SAM": bench_lib.SAM,
  "full gradient": bench_lib.Arm(
    _along(directions.full_gradient),
    radii=(0.25, 0.4, 0.6, 0.95),
    rates=(0.00375, 0.0075, 0.015),
  ),
  "noise": bench_lib.Arm(
    _along(directions.gradient_noise), radii=bench_lib.FSAM.radii
  ),
  "F-SAM": bench_lib.FSAM,
  "EMA": bench_lib.Arm(_along(directions.gradient_ema, lmbda=bench_lib.LMBDA)),
  "random": bench_lib.Arm(
    _along(directions.random_direction),
    radii=(7.0, 11.0, 17.0, 26.0),
    rates=(0.015, 0.03, 0.06),
  ),
  "other batch": bench_lib.Arm(
    _along(directions.other_gradient), radii=(0.4, 0.6, 0.95, 1.5)
  ),
}


def decomposition(context: bench_lib.Context) -> dict[str, Any]:
  """The parts of the gradient as ascent directions, and their controls."""
  bench = bench_lib.Bench(
    context, ARMS, make_step=directions.make_step, with_other_rows=True
  )
  results, measures = {}, {}
  for name in ARMS:
    runs, results[name] = bench.test(name, bench.search(name))
    measures[name] = _measure(bench, name, runs, context)
    results[name] |= {"measures": measures[name]}
  reference = results["F-SAM"]["test_accuracy"]
  rows = [
    [
      name,
      f"{result['learning_rate']:.3g}",
      "-" if result["rho"] is None else f"{result['rho']:g}",
      ", ".join(result["on_edge"]),
      bench_lib.accuracy(result["test_accuracy"]),
      ""
      if name == "F-SAM"
      else bench_lib.signed(
        bench_lib.difference(result["test_accuracy"], reference)
      ),
    ]
    for name, result in results.items()
  ]
  columns = list(next(iter(measures.values())))
  return {
    "results": results,
    "tables": [
      {
        "header": [
          "ascent along",
          "learning rate",
          "rho",
          "at the end of its grid",
          "test accuracy %",
          "over F-SAM",
        ],
        "rows": rows,
      },
      {
        "header": ["ascent along", *columns],
        "rows": [
          [name, *(bench_lib.number(found[c]) for c in columns)]
          for name, found in measures.items()
        ],
      },
    ],
    "panels": [
      {
        "xlabel": "",
        "ylabel": "test accuracy (%)",
        "series": [
          bench_lib.series(
            "",
            list(results),
            [result["test_accuracy"] for result in results.values()],
          )
        ],
      },
      *(
        {
          "xlabel": "",
          "ylabel": column,
          "series": [
            bench_lib.series(
              "", list(measures), [m[column] for m in measures.values()]
            )
          ],
        }
        for column in columns[:3]
      ),
    ],
    "config": {"measured_seeds": list(context.seeds)[:_MEASURED_SEEDS]},
  }


def _measure(bench, name, runs, context) -> dict[str, list[Any]]:
  """Sharpness of some runs on all training rows; NaN where one diverged."""
  number = min(_MEASURED_SEEDS, len(context.seeds))
  found: dict[str, list[Any]] = {}
  tick = context.progress(f"{name}, sharpness", number)
  samples = 2 if context.is_quick else 30
  for run in range(number):
    loss_fn, params, rows = bench.loss_and_data(runs, run, context.seeds)
    key = jax.random.key(run)
    measure = functools.partial(_or_gap, (loss_fn, params, rows))
    noise = measure(sharpness.gradient_noise, rows=context.batch_size)
    values = {
      f"rise along the gradient, {_RHO}": _mean(
        measure(sharpness.ascent_sharpness, rho=_RHO)
      ),
      f"worst rise, {_RHO}": _mean(
        measure(sharpness.worst_sharpness, rho=_RHO, key=key, steps=10)
      ),
      f"mean rise, {_RANDOM_RHO:g}": _mean(
        measure(
          sharpness.average_sharpness,
          rho=_RANDOM_RHO,
          key=key,
          samples=samples,
        )
      ),
      "full gradient's norm": None if noise is None else noise.full_norm,
      "cosine of batch and full gradient": None
      if noise is None
      else float(np.mean(noise.batch_cosine)),
    }
    for what, value in values.items():
      found.setdefault(what, []).append(value)
    tick()
  return {what: _with_nan(values) for what, values in found.items()}


def _or_gap(model, measure, **options):
  """A measure, or None of a run that has diverged."""
  try:
    return measure(*model, **options)
  except ValueError:
    return None


def _mean(rise) -> Any:
  return None if rise is None else rise.mean


def _with_nan(values) -> list[float]:
  return [float("nan") if value is None else value for value in values]


def curvature(context: bench_lib.Context) -> dict[str, Any]:
  """The Hessian's spectrum at the solutions of SGD, SAM and F-SAM."""
  arms = {name: ARMS[name] for name in ("SGD", "SAM", "F-SAM")}
  bench = bench_lib.Bench(context, arms)
  number = min(_MEASURED_SEEDS, len(context.seeds))
  matvecs = 10 if context.is_quick else 60
  results, densities, panels = {}, {}, []
  for name in arms:
    runs, results[name] = bench.test(name, bench.search(name))
    top, trace, density = [], [], []
    tick = context.progress(f"{name}, Hessian", number)
    for run in range(number):
      loss_fn, params, rows = bench.loss_and_data(runs, run, context.seeds)
      key = jax.random.key(run)
      try:
        eigenvalues = sharpness.hessian_eigenvalues(
          loss_fn, params, rows, 5, key=key, num_matvecs=matvecs
        )
        total, _ = sharpness.hessian_trace(
          loss_fn, params, rows, key=key, samples=20
        )
        density.append(
          sharpness.hessian_density(
            loss_fn, params, rows, key=key, num_matvecs=matvecs, samples=2
          )
        )
      except ValueError:  # Diverged.
        eigenvalues, total = np.full(5, np.nan), np.nan
      top.append(eigenvalues)
      trace.append(total)
      tick()
    densities[name] = density
    results[name] |= {"eigenvalues": np.array(top).tolist(), "trace": trace}
  for name, density in densities.items():
    if not density:
      continue
    largest = max(float(np.max(d.nodes)) for d in density)
    smallest = min(float(np.min(d.nodes)) for d in density)
    grid = np.linspace(min(smallest, 0) - 0.1, largest * 1.1 + 0.1, 200)
    smooth = [d.at(grid, width=(grid[-1] - grid[0]) / 50) for d in density]
    panels.append(
      {
        "xlabel": "eigenvalue",
        "ylabel": "density",
        "is_log_y": True,
        "title": name,
        "series": [
          bench_lib.series(name, grid.tolist(), np.maximum(smooth, 1e-7).T)
        ],
      }
    )
  rows = [
    [
      name,
      bench_lib.accuracy(result["test_accuracy"]),
      *(
        bench_lib.number(np.array(result["eigenvalues"])[:, i])
        for i in (0, 1, 4)
      ),
      bench_lib.number(result["trace"]),
    ]
    for name, result in results.items()
  ]
  return {
    "results": results,
    "tables": [
      {
        "header": [
          "",
          "test accuracy %",
          "largest eigenvalue",
          "second",
          "fifth",
          "trace",
        ],
        "rows": rows,
      }
    ],
    "panels": panels,
    "config": {"measured_seeds": list(context.seeds)[:number]},
  }

"""The study of the gradient's parts as ascent directions, with controls."""

import functools
from typing import Any

import jax
import numpy as np

from fsam_optax import sharpness
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import directions
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

MEASURED_SEEDS = 8
_RHO = 0.2  # Of the ascent and of the worst direction.
_RANDOM_RHO = 2.0


def _along(direction: Any, **options: Any):
  """The arm that ascends along a direction."""
  return lambda rho: directions.along(direction(**options), rho)


ARMS = {
  "SGD": arms_lib.SGD,
  "SAM": arms_lib.SAM,
  "full gradient": arms_lib.Arm(
    _along(directions.full_gradient),
    radii=(0.25, 0.4, 0.6, 0.95),
    rates=(0.00375, 0.0075, 0.015),
  ),
  "noise": arms_lib.Arm(
    _along(directions.gradient_noise), radii=arms_lib.FSAM.radii
  ),
  "F-SAM": arms_lib.FSAM,
  "EMA": arms_lib.Arm(_along(directions.gradient_ema, lmbda=arms_lib.LMBDA)),
  "random": arms_lib.Arm(
    _along(directions.random_direction),
    radii=(7.0, 11.0, 17.0, 26.0),
    rates=(0.015, 0.03, 0.06),
  ),
  "other batch": arms_lib.Arm(
    _along(directions.other_gradient), radii=(0.4, 0.6, 0.95, 1.5)
  ),
}


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains along every direction, and measures where it ends.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  contest = contest_lib.Contest(
    context, ARMS, make_step=directions.make_step, with_other_rows=True
  )
  results, measures = {}, {}
  for name in ARMS:
    runs, results[name] = contest.test(name, contest.choose(name))
    measures[name] = measure(contest, name, runs, context)
    results[name] |= {"measures": measures[name]}
  columns = list(next(iter(measures.values())))
  accuracies = [result["test_accuracy"] for result in results.values()]
  rows = [
    [name, *(report.number(found[c]) for c in columns)]
    for name, found in measures.items()
  ]
  return {
    "results": results,
    "tables": [
      _accuracy_table(results),
      {"header": ["ascent along", *columns], "rows": rows},
    ],
    "panels": [
      report.panel("", [report.line("", results, accuracies)]),
      *(_measure_panel(column, measures) for column in columns[:3]),
    ],
    "config": {"measured_seeds": list(context.seeds)[:MEASURED_SEEDS]},
  }


def _accuracy_table(results: dict[str, Any]) -> dict[str, Any]:
  reference = results["F-SAM"]["test_accuracy"]
  rows = [
    [
      name,
      f"{result['learning_rate']:.3g}",
      "-" if result["rho"] is None else f"{result['rho']:g}",
      ", ".join(result["on_edge"]),
      report.accuracy(result["test_accuracy"]),
      ""
      if name == "F-SAM"
      else report.over(result["test_accuracy"], reference),
    ]
    for name, result in results.items()
  ]
  header = [
    "ascent along",
    "learning rate",
    "rho",
    "at the end of its grid",
    "test accuracy %",
    "over F-SAM",
  ]
  return {"header": header, "rows": rows}


def _measure_panel(column: str, measures: dict[str, Any]) -> dict[str, Any]:
  values = [found[column] for found in measures.values()]
  return {
    "xlabel": "",
    "ylabel": column,
    "series": [report.line("", measures, values)],
  }


def measure(
  contest: contest_lib.Contest,
  name: str,
  runs: search.Runs,
  context: arms_lib.Context,
) -> dict[str, list[float]]:
  """Sharpness of some runs on all training rows; NaN where one diverged.

  Args:
    contest: that trained them.
    name: of the arm, for the progress bar.
    runs: of the seeds to report.
    context: what they were trained on.

  Returns:
    Values by what is measured, one a run.
  """
  number = min(MEASURED_SEEDS, len(context.seeds))
  found: dict[str, list[float]] = {}
  advance = context.progress(f"{name}, sharpness", number)
  for run in range(number):
    model = contest.loss_and_data(runs, run, context.seeds)
    for what, value in _measure_one(model, run, context).items():
      found.setdefault(what, []).append(np.nan if value is None else value)
    advance()
  return found


def _measure_one(model: Any, run: int, context: arms_lib.Context):
  """The measures of one run, None where it has diverged."""
  key = jax.random.key(run)
  rise = functools.partial(_mean_or_none, model)
  noise = _or_none(model, sharpness.gradient_noise, rows=context.batch_size)
  return {
    f"rise along the gradient, {_RHO}": rise(
      sharpness.ascent_sharpness, rho=_RHO
    ),
    f"worst rise, {_RHO}": rise(
      sharpness.worst_sharpness, rho=_RHO, key=key, steps=10
    ),
    f"mean rise, {_RANDOM_RHO:g}": rise(
      sharpness.average_sharpness,
      rho=_RANDOM_RHO,
      key=key,
      samples=2 if context.is_quick else 30,
    ),
    "full gradient's norm": noise and noise.full_norm,
    "cosine of batch and full gradient": noise
    and float(np.mean(noise.batch_cosine)),
  }


def _or_none(model: Any, measure: Any, **options: Any) -> Any:
  try:
    return measure(*model, **options)
  except ValueError:  # Its parameters are not finite.
    return None


def _mean_or_none(model: Any, measure: Any, **options: Any) -> Any:
  found = _or_none(model, measure, **options)
  return found and found.mean


ENTRY = entry.Study(
  "decomposition",
  "which part of the gradient is a good ascent direction?",
  run,
)

"""The study of sigma and lmbda, the radius tuned at each value."""

import functools
from typing import Any

from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

_SIGMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains F-SAM at every sigma and at every lmbda.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  sigmas, lmbdas = _SIGMAS, _LMBDAS
  if context.is_quick:
    sigmas, lmbdas = (0.0, 1.0), (arms_lib.LMBDA,)
  pairs = [(sigma, arms_lib.LMBDA) for sigma in sigmas]
  pairs += [(1.0, lmbda) for lmbda in lmbdas if lmbda != arms_lib.LMBDA]
  arms = {
    _name(sigma, lmbda): arms_lib.Arm(
      functools.partial(arms_lib.fsam, sigma=sigma, lmbda=lmbda),
      radii=(0.25, 0.35, 0.5, 0.7),
      rates=(0.02,),
    )
    for sigma, lmbda in pairs
  }
  contest = contest_lib.Contest(context, arms)
  results = {name: contest.test(name, contest.choose(name))[1] for name in arms}
  return {
    "results": results,
    "tables": [_table(results)],
    "panels": [
      _panel(results, "sigma", "lmbda 0.9", sigmas, (None, arms_lib.LMBDA)),
      _panel(results, "lmbda", "sigma 1", lmbdas, (1.0, None)),
    ],
  }


def _name(sigma: float, lmbda: float) -> str:
  return f"sigma {sigma:g}, lmbda {lmbda:g}"


def _table(results: dict[str, Any]) -> dict[str, Any]:
  reference = _name(1.0, arms_lib.LMBDA)
  best = results[reference]["test_accuracy"]
  rows = [
    [
      name,
      f"{result['rho']:g}" + report.star(result),
      report.accuracy(result["test_accuracy"]),
      "" if name == reference else report.over(result["test_accuracy"], best),
    ]
    for name, result in results.items()
  ]
  return {
    "header": ["", "rho", "test accuracy %", f"over {reference}"],
    "rows": rows,
  }


def _panel(results, what, fixed, values, at) -> dict[str, Any]:
  """Accuracy over one of the two, which is None in `at`."""
  names = [_name(*(x if v is None else v for v in at)) for x in values]
  accuracy = [results[name]["test_accuracy"] for name in names]
  return report.panel(
    f"{what}, at {fixed}", [report.line("F-SAM", values, accuracy)]
  )


ENTRY = entry.Study(
  "hyperparameters", "how much do sigma and lmbda matter?", run
)

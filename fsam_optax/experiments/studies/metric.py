"""The study of the metric: F-SAM against SAM in the Euclidean and in ASAM's."""

import functools
from typing import Any

import fsam_optax
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

# As many points as the other arms' grids.
_RADII = (1.5, 3.0, 6.0)
_RATES = (0.004, 0.008, 0.016, 0.032)
_ARMS = {
  "SAM": arms_lib.SAM,
  "F-SAM": arms_lib.FSAM,
  "ASAM": arms_lib.Arm(
    functools.partial(fsam_optax.sam_perturbation, adaptive=True),
    _RADII,
    _RATES,
  ),
  "F-ASAM": arms_lib.Arm(
    functools.partial(
      fsam_optax.friendly_perturbation, lmbda=arms_lib.LMBDA, adaptive=True
    ),
    _RADII,
    _RATES,
  ),
}
_PAIRS = {"F-SAM": "SAM", "ASAM": "SAM", "F-ASAM": "ASAM"}


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains SAM and F-SAM in both metrics.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  contest = contest_lib.Contest(context, _ARMS)
  results = {
    name: contest.test(name, contest.choose(name))[1] for name in _ARMS
  }
  accuracy = {name: x["test_accuracy"] for name, x in results.items()}
  rows = [
    [
      name,
      f"{result['learning_rate']:g}",
      f"{result['rho']:g}" + report.star(result),
      report.accuracy(accuracy[name]),
      f"over {_PAIRS[name]}: "
      + report.over(accuracy[name], accuracy[_PAIRS[name]])
      if name in _PAIRS
      else "",
    ]
    for name, result in results.items()
  ]
  header = ["", "learning rate", "rho", "test accuracy %", "paired"]
  return {
    "results": results,
    "tables": [{"header": header, "rows": rows}],
    "panels": [
      report.panel("", [report.line("", results, accuracy.values())]),
    ],
  }


ENTRY = entry.Study("metric", "does it help in the metric of ASAM, too?", run)

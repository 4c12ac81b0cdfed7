"""The study of the radius: accuracy over rho, at one learning rate for both."""

from typing import Any

from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

_RADII = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)
_RATE = 0.02


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains SAM and F-SAM at every radius.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  arms = {"SAM": arms_lib.SAM, "F-SAM": arms_lib.FSAM}
  contest = contest_lib.Contest(context, arms)
  radii = _RADII[::4] if context.is_quick else _RADII
  points = [
    search.Point(_RATE, radius, arms_lib.UNTUNED_DECAY) for radius in radii
  ]
  accuracy = {
    name: contest.run(name, points, context.seeds).test_accuracy.reshape(
      len(radii), -1
    )
    for name in arms
  }
  rows = [
    [
      f"{radius:g}",
      *(report.accuracy(accuracy[name][i]) for name in arms),
      report.over(accuracy["F-SAM"][i], accuracy["SAM"][i]),
    ]
    for i, radius in enumerate(radii)
  ]
  lines = [report.line(name, radii, accuracy[name]) for name in arms]
  return {
    "results": {
      name: {"rho": list(radii), "test_accuracy": values.tolist()}
      for name, values in accuracy.items()
    },
    "tables": [{"header": ["rho", *arms, "F-SAM over SAM"], "rows": rows}],
    "panels": [report.panel("rho", lines)],
  }


ENTRY = entry.Study("rho", "does F-SAM work at radii where SAM collapses?", run)

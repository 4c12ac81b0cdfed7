"""The study of the radius: accuracy over rho at one rate and decay for both."""

from typing import Any, Mapping

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SAM": arms.SAM, "F-SAM": arms.FSAM}
_RADII = (0.05, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
_RATE, _DECAY = 0.028, 0.014  # SAM's best.


def _run(lab: Lab) -> dict[str, Any]:
  train = lambda name, radius: lab.run(
    name, Point(_RATE, radius, _DECAY), lab.seeds, "radius"
  )["test_accuracy"]
  radii = _RADII[::4] if lab.is_quick else _RADII
  return over_the_radius({x: {r: train(x, r) for r in radii} for x in _ARMS})


def over_the_radius(
  accuracy: Mapping[str, Mapping[float, Any]],
) -> dict[str, Any]:
  """What the JSON holds of SAM and F-SAM over the radius."""
  sam, fsam = accuracy["SAM"], accuracy["F-SAM"]
  rows = [
    [
      radius,
      *(paired_report.accuracy(of[radius]) for of in (sam, fsam)),
      paired_report.over(fsam[radius], sam[radius]),
    ]
    for radius in sam
    if radius in fsam
  ]
  lines = [figures.line(name, of, of.values()) for name, of in accuracy.items()]
  return {
    "results": {
      name: {"rho": list(of), "test_accuracy": list(of.values())}
      for name, of in accuracy.items()
    },
    "tables": [{"header": ["rho", *accuracy, "F-SAM over SAM"], "rows": rows}],
    "panels": [figures.panel("rho", lines)],
  }


STUDY = Study(
  "rho", "does F-SAM work at radii where SAM collapses?", _ARMS, run=_run
)

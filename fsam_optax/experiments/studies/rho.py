"""The study of the radius: accuracy over rho at one rate and decay for both."""

from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SAM": arms.SAM, "F-SAM": arms.FSAM}
_RADII = (0.05, 0.1, 0.14, 0.2, 0.28, 0.4, 0.56, 0.8)
_RATE, _DECAY = 0.028, 0.014  # SAM's best.


def _run(lab: Lab) -> dict[str, Any]:
  run = lambda name, radius: lab.run(
    name, Point(_RATE, radius, _DECAY), lab.seeds, "radius"
  )
  radii = _RADII[::4] if lab.is_quick else _RADII
  results = {f"{x:g}": {name: run(name, x) for name in _ARMS} for x in radii}
  found = paired_report.by_setting(results, [("F-SAM", "SAM")], "rho")
  return found | {"tables": found["tables"][:1]}  # Nothing was searched.


STUDY = Study(
  "rho", "does F-SAM work at radii where SAM collapses?", _ARMS, run=_run
)

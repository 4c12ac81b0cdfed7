"""The study of replicas: does a step that communicates less cost accuracy?

By eight emulated replicas of 12 rows each, each mode at the best of its grid.
"""

from collections.abc import Callable
from typing import Any

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_REPLICAS, _BATCH_SIZE = 8, 96


def _make_step(loss_fn: Callable[..., Any], **options: Any) -> Any:
  """The train step by emulated replicas, of successive rows of a batch."""
  step = fsam_optax.make_train_step(loss_fn, axis_name="replica", **options)
  return fsam_optax.sharding.group_step(step, _REPLICAS, "replica")


def _mode(arm: arms.Arm, rates: Any, radii: Any, **options: Any) -> arms.Arm:
  return arm._replace(
    rates=rates, radii=radii, options=options, make_step=_make_step
  )


_LOCAL, _DESCENT = {"sync_perturbation": False}, {"ema_gradient": "descent"}
_RATES = (0.01, 0.015, 0.02, 0.03)
_SAM_RADII = (0.25, 0.3, 0.35, 0.4, 0.5)
_FSAM_RADII = (0.35, 0.4, 0.5, 0.6, 0.7)
# A replica's 12 rows are easily harmed: their radii are smaller.
_LOCAL_RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
_LOCAL_GRID = ((*_RATES, 0.04), _LOCAL_RADII)
_ARMS = {
  "SGD": _mode(arms.SGD, (0.002, 0.003, 0.004, 0.006), (0.0,)),
  "SAM": _mode(arms.SAM, _RATES, _SAM_RADII),
  "SAM, local": _mode(arms.SAM, *_LOCAL_GRID, **_LOCAL),
  "F-SAM, default": _mode(arms.FSAM, _RATES, _FSAM_RADII),
  "F-SAM, average of the second gradient": _mode(
    arms.FSAM, _RATES, _FSAM_RADII, **_DESCENT
  ),
  "F-SAM, local": _mode(arms.FSAM, *_LOCAL_GRID, **_LOCAL),
  "F-SAM, lean": _mode(arms.FSAM, *_LOCAL_GRID, **_LOCAL, **_DESCENT),
}
# All-reduced a parameter and step; tests/test_sharding.py.
_WORDS = dict(zip(_ARMS, (1, 2, 1, 2, 2, 2, 1), strict=True))


def _run(lab: Lab) -> dict[str, Any]:
  results = lab.at(batch_size=_BATCH_SIZE).results(lab.chosen)
  table = paired_report.arms_table(results, ("F-SAM, default", "SAM"))
  table["header"].insert(1, "words")
  for row in table["rows"]:
    row.insert(1, _WORDS[row[0]])
  return {
    "results": results,
    "tables": [table],
    "panels": [paired_report.bars(results)],
    "config": {"replicas": _REPLICAS, "batch_size": _BATCH_SIZE},
  }


STUDY = Study(
  "replicas",
  "does a step that communicates less cost accuracy?",
  _run,
  _ARMS,
  first_seed=200,
)

"""The study of replicas: does a step that communicates less cost accuracy?

By eight emulated replicas of 12 rows each.
"""

import functools
from typing import Any, Callable

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.study import Setting
from fsam_optax.experiments.lab.study import Study

_REPLICAS, _BATCH_SIZE = 8, 96


def make_step(
  loss_fn: Callable[..., Any], replicas: int = _REPLICAS, **options: Any
) -> Any:
  """The train step by emulated replicas, of successive rows of a batch."""
  step = fsam_optax.make_train_step(loss_fn, axis_name="replica", **options)
  return fsam_optax.sharding.group_step(step, replicas, "replica")


def _mode(arm: arms.Arm, unit: float = 1.0, **options: Any) -> arms.Arm:
  return arm._replace(options=options, make_step=make_step, unit=unit)


_LOCAL: dict[str, Any] = {"sync_perturbation": False}
_DESCENT: dict[str, Any] = {"ema_gradient": "descent"}
_ARMS = {
  "SGD (1 word)": _mode(arms.SGD),
  "SAM (2)": _mode(arms.SAM),
  # A replica's 12 rows are easily harmed: their radii are smaller.
  "SAM, local (1)": _mode(arms.SAM, 0.5, **_LOCAL),
  "F-SAM, default (2)": _mode(arms.FSAM),
  "F-SAM, average of the second gradient (2)": _mode(arms.FSAM, **_DESCENT),
  "F-SAM, local (2)": _mode(arms.FSAM, 0.5, **_LOCAL),
  "F-SAM, lean (1)": _mode(arms.FSAM, 0.5, **_LOCAL, **_DESCENT),
}
STUDY = Study(
  "replicas",
  "does a step that communicates less cost accuracy?",
  _ARMS,
  functools.partial(paired_report.by_arm, reference="F-SAM, default (2)"),
  [
    Setting("digits, 40 % wrong", "digits", changes={"batch_size": _BATCH_SIZE})
  ],
)

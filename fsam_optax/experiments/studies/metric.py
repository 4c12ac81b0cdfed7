"""The study of the metric: F-SAM against SAM in the Euclidean and in ASAM's."""

import functools

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.study import Study

_ARMS = {
  "SAM": arms.SAM,
  "F-SAM": arms.FSAM,
  "ASAM": arms.Arm(
    functools.partial(fsam_optax.sam_perturbation, adaptive=True), "sam", 10
  ),
  "F-ASAM": arms.Arm(functools.partial(arms.fsam, adaptive=True), unit=10),
}
STUDY = Study(
  "metric",
  "does it help in the metric of ASAM, too?",
  _ARMS,
  functools.partial(
    paired_report.by_setting,
    pairs=[("F-SAM", "SAM"), ("F-ASAM", "ASAM"), ("F-ASAM", "F-SAM")],
  ),
)

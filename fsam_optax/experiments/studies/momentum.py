"""The study of the momentum: the optimizer's average in place of F-SAM's."""

from typing import Any

import optax

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import trainer
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study


def _momentum(rho: Any) -> optax.GradientTransformation:
  return fsam_optax.friendly_perturbation(
    rho, lmbda=trainer.MOMENTUM, average="optimizer"
  )


def _adamw(
  learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  return optax.adamw(schedule, b1=trainer.MOMENTUM, weight_decay=weight_decay)


_ARMS = {
  "SAM": arms.SAM,
  "F-SAM, momentum": arms.Arm(_momentum),
  "F-SAM": arms.FSAM,
}
# By the optimizer: its learning rates, radii and weight decays, 27 points for
# each arm to begin with, in steps of a square root of two.
_OPTIMIZERS = {
  "SGD": (
    trainer.descent,
    ((0.028, 0.04, 0.056), (0.2, 0.28, 0.4), (0.01, 0.014, 0.02)),
  ),
  "AdamW": (
    _adamw,
    ((0.001, 0.0014, 0.002), (0.28, 0.4, 0.56), (0.5, 0.7, 1.0)),
  ),
}


def _run(lab: Lab) -> dict[str, Any]:
  results = {}
  for name, (make_tx, (rates, radii, decays)) in _OPTIMIZERS.items():
    at = lab.at(
      arms={
        arm: x._replace(rates=rates, radii=radii, decays=decays)
        for arm, x in _ARMS.items()
      },
      described={"optimizer": name},
      trainer_options={"make_tx": make_tx},
    )
    results[name] = at.results(with_candidates=True)
  found = paired_report.by_setting("optimizer", results)
  return {**found, "config": {"weight_decay": "searched"}}


STUDY = Study(
  "momentum", "does the optimizer's momentum serve as the average?", _run, _ARMS
)

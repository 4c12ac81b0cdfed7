"""The study of label noise: accuracy over the fraction of wrong labels."""

from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_FRACTIONS = (0.0, 0.2, 0.4, 0.6)
# 64 points to begin with for each arm, in steps of about a square root of two.
_EIGHT = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056)
_ARMS = {
  "SGD": arms.SGD._replace(rates=_EIGHT, decays=_EIGHT),
  "SAM": arms.SAM._replace(
    rates=_EIGHT[4:], radii=(0.14, 0.2, 0.28, 0.4), decays=_EIGHT[2:6]
  ),
  "F-SAM": arms.FSAM._replace(
    rates=_EIGHT[4:], radii=(0.2, 0.28, 0.4, 0.56), decays=_EIGHT[2:6]
  ),
}


def _run(lab: Lab) -> dict[str, Any]:
  fractions = _FRACTIONS[:3:2] if lab.is_quick else _FRACTIONS
  found = paired_report.by_setting(
    "label noise",
    {
      fraction: lab.at(label_noise=fraction).results(with_candidates=True)
      for fraction in fractions
    },
  )
  config = {"label_noise": list(fractions), "weight_decay": "searched"}
  return {**found, "config": config}


STUDY = Study("label-noise", "how does it do with wrong labels?", _run, _ARMS)

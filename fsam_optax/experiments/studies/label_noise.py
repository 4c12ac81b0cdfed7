"""The study of label noise: accuracy over the fraction of wrong labels."""

from typing import Any

from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

_FRACTIONS = (0.0, 0.2, 0.4, 0.6)
# 64 points to begin with for each arm, in steps of about a square root of two.
_EIGHT = (0.005, 0.007, 0.01, 0.014, 0.02, 0.028, 0.04, 0.056)
_ARMS = {
  "SGD": arms_lib.SGD._replace(rates=_EIGHT, decays=_EIGHT),
  "SAM": arms_lib.SAM._replace(
    rates=_EIGHT[4:], radii=(0.14, 0.2, 0.28, 0.4), decays=_EIGHT[2:6]
  ),
  "F-SAM": arms_lib.FSAM._replace(
    rates=_EIGHT[4:], radii=(0.2, 0.28, 0.4, 0.56), decays=_EIGHT[2:6]
  ),
}


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains each arm at each fraction, at what is best for it there.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  contest = contest_lib.Contest(context, _ARMS)
  fractions = _FRACTIONS[:3:2] if context.is_quick else _FRACTIONS
  results = {
    f"{fraction:g}": {
      name: contest.test(
        name, contest.choose(name, fraction), fraction, with_candidates=True
      )[1]
      for name in _ARMS
    }
    for fraction in fractions
  }
  found = report.by_setting("label noise", fractions, results, _ARMS)
  config = {"label_noise": list(fractions), "weight_decay": "searched"}
  return {**found, "config": config}


ENTRY = entry.Study("label-noise", "how does it do with wrong labels?", run)

"""The study of label noise: accuracy over the fraction of wrong labels."""

from typing import Any

from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report
from fsam_optax.experiments.studies import search

_RADII = (0.1, 0.2, 0.35, 0.6, 1.0)
_SGD_RATES = tuple(0.0005 * 1.4**i for i in range(15))
_FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8)


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains each arm at each fraction, at what is best for it there.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  arms = {
    "SGD": arms_lib.SGD._replace(rates=_SGD_RATES),
    "SAM": arms_lib.SAM._replace(radii=_RADII),
    "F-SAM": arms_lib.FSAM._replace(radii=_RADII),
  }
  contest = search.Contest(context, arms)
  fractions = _FRACTIONS[:3:2] if context.is_quick else _FRACTIONS
  results = {
    f"{fraction:g}": {
      name: contest.test(name, contest.search(name, fraction), fraction)[1]
      for name in arms
    }
    for fraction in fractions
  }
  found = report.by_setting("label noise", fractions, results, arms)
  return {**found, "config": {"label_noise": list(fractions)}}


ENTRY = entry.Study("label-noise", "how does it do with wrong labels?", run)

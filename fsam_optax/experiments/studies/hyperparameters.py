"""The study of sigma and lmbda, the other values tuned at each of them."""

import functools
from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.store import Results
from fsam_optax.experiments.lab.study import Study

_SIGMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
_name = "sigma {:g}, lmbda {:g}".format
_DEFAULT = _name(1.0, arms.LMBDA)
_ARMS = {
  _name(sigma, lmbda): arms.Arm(
    functools.partial(arms.fsam, sigma=sigma, lmbda=lmbda)
  )
  for sigma, lmbda in (
    *((sigma, arms.LMBDA) for sigma in _SIGMAS),
    *((1.0, lmbda) for lmbda in _LMBDAS if lmbda != arms.LMBDA),
  )
}


def _report(results: Results) -> dict[str, Any]:
  (of,) = results.values()
  panels = []
  for what, names in (
    ("sigma, at lmbda 0.9", {x: _name(x, arms.LMBDA) for x in _SIGMAS}),
    ("lmbda, at sigma 1", {x: _name(1.0, x) for x in _LMBDAS}),
  ):
    found = {x: of[y]["test_accuracy"] for x, y in names.items() if y in of}
    if found:
      line = figures.line("F-SAM", found, found.values())
      panels.append(figures.panel(what, [line]))
  return paired_report.by_arm(results, _DEFAULT) | {"panels": panels}


STUDY = Study(
  "hyperparameters", "how much do sigma and lmbda matter?", _ARMS, _report
)

"""The study of sigma and lmbda, the radius tuned at each value."""

import functools
from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_SIGMAS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
_name = "sigma {:g}, lmbda {:g}".format
_ARMS = {
  _name(sigma, lmbda): arms.Arm(
    functools.partial(arms.fsam, sigma=sigma, lmbda=lmbda),
    radii=(0.25, 0.35, 0.5, 0.7),
    rates=(0.02,),
  )
  for sigma, lmbda in (
    *((sigma, arms.LMBDA) for sigma in _SIGMAS),
    *((1.0, lmbda) for lmbda in _LMBDAS if lmbda != arms.LMBDA),
  )
}


def _run(lab: Lab) -> dict[str, Any]:
  sigmas, lmbdas = _SIGMAS, _LMBDAS
  if lab.is_quick:
    sigmas, lmbdas = (0.0, 1.0), (arms.LMBDA,)
  over_sigma = {sigma: _name(sigma, arms.LMBDA) for sigma in sigmas}
  over_lmbda = {lmbda: _name(1.0, lmbda) for lmbda in lmbdas}
  names = dict.fromkeys([*over_sigma.values(), *over_lmbda.values()])
  results = lab.results(list(names))
  return {
    "results": results,
    "tables": [paired_report.arms_table(results, [_name(1.0, arms.LMBDA)])],
    "panels": [
      _panel(results, "sigma, at lmbda 0.9", over_sigma),
      _panel(results, "lmbda, at sigma 1", over_lmbda),
    ],
  }


def _panel(results, what: str, names: dict[float, str]) -> dict[str, Any]:
  accuracy = [results[name]["test_accuracy"] for name in names.values()]
  line = paired_report.line("F-SAM", names, accuracy)
  return paired_report.panel(what, [line])


STUDY = Study(
  "hyperparameters", "how much do sigma and lmbda matter?", _run, _ARMS
)

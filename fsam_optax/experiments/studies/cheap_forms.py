"""The study of cheap forms: which gradient may the ascent do without?

SGD, SAM, F-SAM and their cheaper forms, each with a search of its own. Then
fractions of the rows by the rule for their radius, without a search.
"""

from typing import Any

import numpy as np
import optax

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.store import Results
from fsam_optax.experiments.lab.study import Setting
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import ascents
from fsam_optax.experiments.studies import direction
from fsam_optax.experiments.studies import label_noise

MOMENTUM = 'F-SAM, `average="optimizer"`'


def fraction(of_rows: float) -> arms.Arm:
  """F-SAM that ascends by a part of the rows, its radius by the rule."""
  return arms.FSAM._replace(
    options={"ascent_fraction": of_rows, "ema_gradient": "descent"},
    unit=of_rows**-0.2,
    gradients=1 + of_rows,
  )


ARMS = {
  "SGD": arms.SGD._replace(gradients=1),
  "SGD, twice the epochs": arms.SGD._replace(gradients=2, epochs=2),
  "random direction": direction.RANDOM._replace(gradients=1),
  "along minus the momentum (MSAM)": arms.FSAM._replace(
    perturbation=lambda rho: ascents.along(
      optax.chain(optax.trace(arms.MOMENTUM), ascents.previous_gradient()), rho
    ),
    options={"ema_gradient": "descent"},
    gradients=1,
  ),
  "SAM, 12 % of the rows": arms.SAM._replace(
    options={"ascent_fraction": 0.12}, unit=1.5, gradients=1.12
  ),
  '12 % of the rows, `ema_gradient="descent"`': fraction(0.12),
  "in the last 30 %, `start`": arms.FSAM._replace(last=0.3, gradients=1.3),
  "at long gradients (AE-SAM)": arms.FSAM._replace(
    perturbation=lambda rho: ascents.gated(arms.fsam(rho)),
    watch=lambda state: {
      "gradients": 1 + round(float(np.mean(state.memory[1] / state.count)), 3)
    },
    gradients=2,
  ),
  "every second step, `every=2`": arms.FSAM._replace(
    options={"every": 2}, gradients=1.5
  ),
  "SAM": arms.SAM._replace(gradients=2),
  "F-SAM": arms.FSAM._replace(gradients=2),
  MOMENTUM: arms.FSAM_MOMENTUM._replace(gradients=2),
}
_RULE = {
  f"{100 * part:g} % of the rows, by the rule": part
  for part in (0.5, 0.25, 0.12, 0.06)  # Whole rows of a batch of 100.
}
SETTINGS = [
  Setting("mnist, 40 % wrong"),
  Setting("digits, 40 % wrong", "digits"),
  Setting("mnist, 0 % wrong", label_noise=0.0, best=label_noise.RIGHT_LABELS),
]


def some(*names: str) -> dict[str, arms.Arm]:
  """The forms of these names."""
  return {name: ARMS[name] for name in names}


def _by_rule(lab: Lab) -> None:
  if "F-SAM" not in lab.arms:
    return
  full = lab.test("F-SAM")
  lab = lab.at(arms={name: fraction(part) for name, part in _RULE.items()})
  for name, part in _RULE.items():
    point = Point(*(full[x] for x in Point._fields))
    point = point._replace(rho=point.rho * part**-0.2)
    lab.run(name, point, lab.seeds, "test")


def _report(results: Results) -> dict[str, Any]:
  searched, by_rule = (
    {
      title: {name: of[name] for name in of if name in names}
      for title, of in results.items()
    }
    for names in (ARMS, {"F-SAM", *_RULE})
  )
  found = paired_report.by_arm(searched)
  rule, _ = paired_report.by_arm(by_rule)["tables"]
  return found | {"tables": [*found["tables"], rule]}


STUDY = Study(
  "cheap-forms",
  "which gradient may the ascent do without?",
  ARMS,
  _report,
  SETTINGS,
  _by_rule,
)

"""The study of the direction: which part of a gradient is a good ascent?

The batch's own noise (F-SAM), the noise of another batch, no part of any (a
random direction), the full gradient, the average alone, the gradient (SAM), and
both of parts of the batch (m-SAM); with two normalizations and three batches.
"""

import functools
from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.networks.mlp import MLP
from fsam_optax.experiments.studies import ascents
from fsam_optax.experiments.studies import replicas

_PARTS = 4  # Of a batch, for m-SAM.
RANDOM = arms.Arm(
  lambda rho: ascents.along(ascents.random_direction(), rho), unit=20
)


def _along(direction: Any, **options: Any) -> arms.Arm:
  return arms.Arm(
    lambda rho: ascents.along(direction(**options), rho),
    make_step=ascents.step_on_other_rows,
    sees_more=True,
  )


_OF_PARTS: dict[str, Any] = {
  "unit": 0.7,
  "options": {"sync_perturbation": False},
  "make_step": functools.partial(replicas.make_step, replicas=_PARTS),
}
_ARMS = {
  "SGD": arms.SGD,
  "SAM": arms.SAM,
  "F-SAM": arms.FSAM,
  "random direction": RANDOM,
  "another batch's noise": _along(ascents.other_noise, lmbda=arms.LMBDA),
  "average alone (VaSSO)": _along(ascents.gradient_ema, lmbda=arms.LMBDA),
  "gradients of quarters (m-SAM)": arms.SAM._replace(**_OF_PARTS),
  "noise of quarters": arms.FSAM._replace(**_OF_PARTS),
  "full gradient": _along(ascents.full_gradient),
}


def _setting(title: str, norm: Any, rho: float, rows: int) -> study.Setting:
  # Larger batches take fewer steps.
  scale = (rows / 128) ** 0.5
  ascending = Point(0.03 * scale, rho, 0.03)
  return study.Setting(
    f"{title}, {rows} rows",
    model=f"mlp with {title}",
    best={
      # SGD has another, lower optimum at learning rates of 1 and more.
      "sgd": Point(0.01 * scale, 0, 0.03),
      "sam": ascending,
      "fsam": ascending,
    },
    changes={
      "network": lambda classes: MLP(classes, norm=norm),
      "batch_size": rows,
      "search_seeds": range(8),
    },
  )


_NORMS = ("BatchNorm", "batch", 0.6), ("GroupNorm", "group", 0.4)
# 500 of the 1,000 rows, two steps an epoch, in place of 512.
SETTINGS = [_setting(*norm, rows) for rows in (32, 128, 500) for norm in _NORMS]
STUDY = study.Study(
  "direction",
  "which part of the gradient is a good ascent direction?",
  _ARMS,
  settings=SETTINGS,
  seeds=32,
)

r"""The study of convergence: the gradient's norm against the steps.

The theory (Li et al., theorem 3) lets learning rate and radius fall by
:math:`1 / \sqrt{t}` and bounds the mean of the squared norm over :math:`T`
steps by :math:`O(\log T / \sqrt{T})`.
"""

from typing import Any

from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import ascents

_STEPS = 4096
_POINT = Point(learning_rate=0.1, rho=0.5, weight_decay=0.0)


def _falling(value: Any) -> optax.Schedule:
  return lambda count: value / jnp.sqrt(count + 1.0)


def _arm(ascent: Any) -> arms.Arm:
  """An ascent whose radius falls, and that sees the full gradient's norm."""

  def see(memory, count, gradient, perturbation, gradient_on):
    del gradient
    total, sums = memory
    total += optax.tree.norm(gradient_on("whole"), squared=True)
    # The sum over the first 1, 2, 4, ... steps.
    steps = 2 ** jnp.arange(len(sums))
    return perturbation, (total, jnp.where(count + 1 == steps, total, sums))

  start = lambda params: (jnp.zeros([]), jnp.zeros(int(np.log2(_STEPS)) + 1))
  return arms.Arm(
    lambda rho: ascents.with_memory(ascent(_falling(rho)), start, see),
    make_step=ascents.step_on_other_rows,
    sees_more=True,
    watch=lambda state: {"sums": np.asarray(state.memory[1]).tolist()},
  )


_ARMS = {
  "SGD": _arm(lambda rho: optax.set_to_zero()),
  "SAM": _arm(fsam_optax.sam_perturbation),
  "F-SAM": _arm(arms.fsam),
}


def _run(lab: Lab) -> dict[str, Any]:
  steps = 64 if lab.is_quick else _STEPS
  lab = lab.at(
    epochs=-(-steps // (lab.pool.train_size // lab.batch_size)),
    trainer_options={
      "is_iid": True,
      "make_tx": lambda rate, *_: optax.sgd(_falling(rate)),
    },
  )
  points = 2 ** np.arange(4, int(np.log2(steps)) + 1)
  shown = (0, len(points) // 2, -1)
  results, rows, lines = {}, [], []
  for name in _ARMS:
    row = lab.run(name, _POINT, lab.seeds, "convergence")
    means = np.array(row["sums"])[:, np.log2(points).astype(int)] / points
    slopes = _slopes(points, means)
    results[name] = row | {
      "steps": points.tolist(),
      "mean_squared_norm": means.tolist(),
      "slopes": slopes,
    }
    cells = [paired_report.number(means[:, i]) for i in shown]
    rows.append([name, *cells, paired_report.number(slopes)])
    lines.append(figures.line(name, points.tolist(), means.T))
  norms = [f"mean squared norm over {points[i]} steps" for i in shown]
  return {
    "results": results,
    "tables": [{"header": ["", *norms, "fitted rate"], "rows": rows}],
    "panels": [
      figures.panel(
        "steps",
        lines,
        "mean squared norm of the full gradient",
        xscale="log",
        yscale="log",
      )
    ],
    "config": {
      "learning_rate_schedule": "1 / sqrt(t)",
      "epochs": lab.epochs,
      "momentum": 0.0,
    },
  }


def _slopes(points: np.ndarray, means: np.ndarray) -> list[float]:
  """Of each run, the power of the steps with which its mean falls, late."""
  late = points >= points[-1] // 16
  return [
    float(np.polyfit(np.log(points[late]), np.log(row[late]), 1)[0])
    if np.all(np.isfinite(row))
    else np.nan
    for row in means
  ]


STUDY = Study(
  "convergence", "how fast does the gradient vanish?", _ARMS, run=_run, seeds=8
)

r"""The study of convergence: the gradient's norm against the steps.

The theory (Li et al., theorem 3) lets learning rate and radius fall by
:math:`1 / \sqrt{t}` and bounds the mean of the squared norm over :math:`T`
steps by :math:`O(\log T / \sqrt{T})`.
"""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report
from fsam_optax.experiments.studies.problem import Problem

_ARMS = {
  "SGD": None,
  "SAM": fsam_optax.sam_perturbation,
  "F-SAM": arms_lib.fsam,
}
_EVERY = 8  # Steps between two measurements.


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Measures the full gradient along runs, and fits the rate of its fall.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  steps = 64 if context.is_quick else 4096
  problem = Problem(context, list(context.seeds))
  falling = lambda value: lambda t: value / jnp.sqrt(t + 1.0)
  points = 2 ** np.arange(4, int(np.log2(steps)) + 1)
  shown = (0, len(points) // 2, -1)
  results, rows, lines = {}, [], []
  for name, ascent in _ARMS.items():
    advance = context.progress(name, 1)
    perturbation = (
      optax.set_to_zero() if ascent is None else ascent(falling(0.5))
    )
    norms = _squared_norms(context, problem, perturbation, falling(0.1), steps)
    advance()
    means = np.cumsum(norms, axis=1) / np.arange(1, norms.shape[1] + 1)
    at = means[:, points // _EVERY - 1]
    slopes = _slopes(points, at)
    results[name] = {
      "steps": points.tolist(),
      "mean_squared_norm": at.tolist(),
      "slopes": slopes,
    }
    cells = [report.number(at[:, i]) for i in shown]
    rows.append([name, *cells, report.number(slopes)])
    lines.append(report.line(name, points.tolist(), at.T))
  return {
    "results": results,
    "tables": [{"header": _header([points[i] for i in shown]), "rows": rows}],
    "panels": [_panel(lines)],
  }


def _slopes(points: np.ndarray, at: np.ndarray) -> list[float]:
  """Of each run, the power of the steps with which its mean falls at the end.

  Args:
    points: numbers of steps.
    at: mean squared norm of each run up to each of them.

  Returns:
    One a run, NaN where it has diverged.
  """
  late = points >= points[-1] // 16
  return [
    float(np.polyfit(np.log(points[late]), np.log(row[late]), 1)[0])
    if np.all(np.isfinite(row))
    else np.nan
    for row in at
  ]


def _header(chosen: list[int]) -> list[str]:
  norms = [f"mean squared norm over {t} steps" for t in chosen]
  return ["", *norms, "fitted rate"]


def _panel(lines: list[dict[str, Any]]) -> dict[str, Any]:
  return {
    "xlabel": "steps",
    "ylabel": "mean squared norm of the full gradient",
    "is_log": True,
    "is_log_y": True,
    "series": lines,
  }


def _squared_norms(context, problem, perturbation, rate, steps) -> np.ndarray:
  """Of the full gradient at every so many steps of each run."""
  tx = optax.sgd(rate)
  gradient_of = jax.grad(problem.loss)
  rows = context.pool.train_size

  def run(params, x, y, key):
    def step(carry, t):
      params, opt_state, ascent = carry
      chosen = jax.random.randint(
        jax.random.fold_in(key, t), (context.batch_size,), 0, rows
      )
      part = {"x": x[chosen], "y": y[chosen]}
      gradient = gradient_of(params, part)
      epsilon, ascent = perturbation.update(gradient, ascent, params)
      second = gradient_of(optax.apply_updates(params, epsilon), part)
      updates, opt_state = tx.update(second, opt_state, params)
      return (optax.apply_updates(params, updates), opt_state, ascent), None

    def stretch(carry, start):
      full = gradient_of(carry[0], {"x": x, "y": y})
      carry, _ = jax.lax.scan(step, carry, start + jnp.arange(_EVERY))
      return carry, optax.tree.norm(full, squared=True)

    start = params, tx.init(params), perturbation.init(params)
    return jax.lax.scan(stretch, start, jnp.arange(0, steps, _EVERY))[1]

  return np.asarray(problem.over_seeds(run, seed=1), np.float64)


ENTRY = entry.Study(
  "convergence", "how fast does the gradient vanish?", run, seeds=8
)

"""The study of the average: how well it tracks the full gradient.

One run of F-SAM carries an average for every lmbda, of the batch gradients and
of the full gradients at the same weights. The second is what the first expects:
its distance from the full gradient is the bias, the distance between the two
the variance.
"""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.seeds import one_run
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report
from fsam_optax.experiments.studies.problem import Problem

_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
_RHO = 0.4  # Of the F-SAM run whose average is watched.
_HEADER = [
  "sampling, learning rate",
  "lmbda",
  "squared error",
  "bias",
  "variance",
  "variance / batch's",
  "(1 - l) / (1 + l)",
  "cosine",
]
_LABELS = {
  "error": "squared error / full gradient's square",
  "bias": "squared bias / full gradient's square",
  "variance": "variance / full gradient's square",
  "cosine": "cosine with the full gradient",
}


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Watches the averages at several rates and ways to draw a batch.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  rates = (0.01, 0.03) if context.is_quick else (0.003, 0.01, 0.03)
  lmbdas = _LMBDAS[::3] if context.is_quick else _LMBDAS
  results: dict[str, Any] = {}
  for sampling in ("epoch-wise", "i.i.d."):
    for rate in rates:
      advance = context.progress(f"{sampling}, rate {rate:g}", 1)
      results[f"{sampling}, {rate:g}"] = _watch(
        context, rate, lmbdas, sampling == "i.i.d."
      )
      advance()
  rows = [
    _row(setting, found, i, lmbda)
    for setting, found in results.items()
    for i, lmbda in enumerate(lmbdas)
  ]
  panels = [
    {
      "xlabel": "lmbda",
      "ylabel": label,
      "is_log_y": what != "cosine",
      "series": [
        report.line(setting, lmbdas, np.array(found[what]).T)
        for setting, found in results.items()
      ],
    }
    for what, label in _LABELS.items()
  ]
  return {
    "results": results,
    "tables": [{"header": _HEADER, "rows": rows}],
    "panels": panels,
  }


def _row(setting: str, found: dict[str, Any], i: int, lmbda: float):
  cell = lambda what: report.number(np.array(found[what])[:, i])
  before = ("error", "bias", "variance", "variance_ratio")
  # What independent gradients would leave of the variance of one.
  expected = f"{(1 - lmbda) / (1 + lmbda):.3f}"
  return [setting, f"{lmbda:g}", *map(cell, before), expected, cell("cosine")]


def _watch(context, rate, lmbdas, is_iid) -> dict[str, Any]:
  """Errors of the averages over a run, means over its later nine tenths."""
  problem = Problem(context, list(context.seeds))
  steps = context.epochs * (context.pool.train_size // context.batch_size)
  perturbation = fsam_optax.friendly_perturbation(_RHO)
  tx = optax.chain(
    optax.add_decayed_weights(arms_lib.UNTUNED_DECAY),
    optax.sgd(
      optax.cosine_decay_schedule(rate, steps), momentum=one_run.MOMENTUM
    ),
  )
  gradient_of = jax.grad(problem.loss)
  decays = jnp.array(lmbdas)[:, None]

  def run(params, x, y, key):
    def step(carry, t):
      params, opt_state, ascent, averages, expected = carry
      chosen = _batch(context, key, t, is_iid)
      part = {"x": x[chosen], "y": y[chosen]}
      gradient = gradient_of(params, part)
      full = _flat(gradient_of(params, {"x": x, "y": y}))
      vector = _flat(gradient)
      mix = lambda m, g: jnp.where(t == 0, g, decays * m + (1 - decays) * g)
      averages, expected = mix(averages, vector), mix(expected, full)
      epsilon, ascent = perturbation.update(gradient, ascent, params)
      second = gradient_of(optax.apply_updates(params, epsilon), part)
      updates, opt_state = tx.update(second, opt_state, params)
      params = optax.apply_updates(params, updates)
      measured = _measure(averages, expected, vector, full)
      return (params, opt_state, ascent, averages, expected), measured

    zeros = jnp.zeros((len(lmbdas), _flat(params).shape[0]))
    start = params, tx.init(params), perturbation.init(params), zeros, zeros
    return jax.lax.scan(step, start, jnp.arange(steps))[1]

  return _late(problem.over_seeds(run, seed=0), steps)


def _batch(context, key, t, is_iid) -> jax.Array:
  """Rows of a step: drawn anew, or the next of an epoch's permutation."""
  rows, batch = context.pool.train_size, context.batch_size
  if is_iid:
    return jax.random.randint(jax.random.fold_in(key, t), (batch,), 0, rows)
  epoch, place = t // (rows // batch), t % (rows // batch)
  order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
  return jax.lax.dynamic_slice_in_dim(order, place * batch, batch)


def _measure(averages, expected, vector, full) -> dict[str, jax.Array]:
  square = lambda v: jnp.sum(v**2, axis=-1)
  scale = jnp.sqrt(square(averages) * square(full) + 1e-30)
  return {
    "error": square(averages - full),
    "bias": square(expected - full),
    "variance": square(averages - expected),
    "batch_variance": square(vector - full),
    "full": square(full),
    "cosine": averages @ full / scale,
  }


def _late(measured: Any, steps: int) -> dict[str, Any]:
  """Means after the first tenth, in units of the full gradient's square."""
  late = jax.tree.map(
    lambda v: np.asarray(v, np.float64)[:, steps // 10 :].mean(axis=1), measured
  )
  full, batch = late["full"][:, None], late["batch_variance"][:, None]
  return {
    "error": (late["error"] / full).tolist(),
    "bias": (late["bias"] / full).tolist(),
    "variance": (late["variance"] / full).tolist(),
    "variance_ratio": (late["variance"] / batch).tolist(),
    "cosine": late["cosine"].tolist(),
  }


def _flat(tree: Any) -> jax.Array:
  return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


ENTRY = entry.Study(
  "ema", "does the average track the full gradient?", run, seeds=8
)

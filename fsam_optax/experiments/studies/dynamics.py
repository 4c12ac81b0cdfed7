"""Studies of single runs as they train: the average, and convergence."""

import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import models
from fsam_optax.experiments import training
from fsam_optax.experiments.studies import bench as bench_lib

_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
_RHO = 0.4  # Of the F-SAM run whose average is watched.


def ema(context: bench_lib.Context) -> dict[str, Any]:
  """How well averages of batch gradients track the full gradient.

  One run of F-SAM carries an average for every lmbda, of the batch gradients
  and of the full gradients at the same weights. The second is what the first
  expects: its distance from the full gradient is the bias, the distance between
  the two the variance.
  """
  rates = (0.01, 0.03) if context.is_quick else (0.003, 0.01, 0.03)
  lmbdas = _LMBDAS[::3] if context.is_quick else _LMBDAS
  seeds = list(context.seeds)
  results: dict[str, Any] = {}
  for sampling in ("epoch-wise", "i.i.d."):
    for rate in rates:
      tick = context.progress(f"{sampling}, rate {rate:g}", 1)
      results[f"{sampling}, {rate:g}"] = _watch(
        context, seeds, rate, lmbdas, sampling == "i.i.d."
      )
      tick()
  rows = []
  for setting, found in results.items():
    for i, lmbda in enumerate(lmbdas):
      at = lambda what, i=i, found=found: np.array(found[what])[:, i]
      rows.append(
        [
          setting,
          f"{lmbda:g}",
          bench_lib.number(at("error")),
          bench_lib.number(at("bias")),
          bench_lib.number(at("variance")),
          bench_lib.number(at("variance_ratio")),
          f"{(1 - lmbda) / (1 + lmbda):.3f}",
          bench_lib.number(at("cosine")),
        ]
      )
  panels = []
  for what, label in (
    ("error", "squared error / full gradient's square"),
    ("bias", "squared bias / full gradient's square"),
    ("variance", "variance / full gradient's square"),
    ("cosine", "cosine with the full gradient"),
  ):
    panels.append(
      {
        "xlabel": "lmbda",
        "ylabel": label,
        "is_log_y": what != "cosine",
        "series": [
          bench_lib.series(setting, lmbdas, np.array(found[what]).T)
          for setting, found in results.items()
        ],
      }
    )
  return {
    "results": results,
    "tables": [
      {
        "header": [
          "sampling, learning rate",
          "lmbda",
          "squared error",
          "bias",
          "variance",
          "variance / batch's",
          "(1 - l) / (1 + l)",
          "cosine",
        ],
        "rows": rows,
      }
    ],
    "panels": panels,
  }


def _watch(context, seeds, rate, lmbdas, is_iid) -> dict[str, Any]:
  """Errors of the averages over a run, means over its later nine tenths."""
  loss_and_data = _Problem(context, seeds)
  batch = context.batch_size
  rows = context.pool.train_size
  steps = context.epochs * (rows // batch)
  decays = jnp.array(lmbdas)
  perturbation = fsam_optax.friendly_perturbation(_RHO)
  tx = optax.chain(
    optax.add_decayed_weights(training.WEIGHT_DECAY),
    optax.sgd(
      optax.cosine_decay_schedule(rate, steps), momentum=training.MOMENTUM
    ),
  )
  gradient_of = jax.grad(loss_and_data.loss)
  flat = lambda tree: jnp.concatenate(
    [jnp.ravel(x) for x in jax.tree.leaves(tree)]
  )

  def run(params, x, y, key):
    def step(carry, t):
      params, opt_state, ascent, averages, expected = carry
      own = jax.random.fold_in(key, t)
      if is_iid:
        chosen = jax.random.randint(own, (batch,), 0, rows)
      else:
        epoch, place = t // (rows // batch), t % (rows // batch)
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows)
        chosen = jax.lax.dynamic_slice_in_dim(order, place * batch, batch)
      part = {"x": x[chosen], "y": y[chosen]}
      gradient = gradient_of(params, part)
      full = flat(gradient_of(params, {"x": x, "y": y}))
      vector = flat(gradient)
      is_first = t == 0
      mix = lambda m, g: jnp.where(
        is_first, g, decays[:, None] * m + (1 - decays[:, None]) * g
      )
      averages, expected = mix(averages, vector), mix(expected, full)
      square = lambda v: jnp.sum(v**2, axis=-1)
      epsilon, ascent = perturbation.update(gradient, ascent, params)
      second = gradient_of(optax.apply_updates(params, epsilon), part)
      updates, opt_state = tx.update(second, opt_state, params)
      params = optax.apply_updates(params, updates)
      measured = {
        "error": square(averages - full),
        "bias": square(expected - full),
        "variance": square(averages - expected),
        "batch_variance": square(vector - full),
        "full": square(full),
        "cosine": averages
        @ full
        / jnp.sqrt(square(averages) * square(full) + 1e-30),
      }
      carry = params, opt_state, ascent, averages, expected
      return carry, measured

    size = flat(params).shape[0]
    zeros = jnp.zeros((len(lmbdas), size))
    start = params, tx.init(params), perturbation.init(params), zeros, zeros
    return jax.lax.scan(step, start, jnp.arange(steps))[1]

  measured = jax.jit(jax.vmap(run))(
    loss_and_data.params,
    loss_and_data.x,
    loss_and_data.y,
    jax.random.split(jax.random.key(0), len(seeds)),
  )
  late = jax.tree.map(
    lambda v: np.asarray(v, np.float64)[:, steps // 10 :].mean(axis=1), measured
  )
  full = late["full"][:, None]
  return {
    "error": (late["error"] / full).tolist(),
    "bias": (late["bias"] / full).tolist(),
    "variance": (late["variance"] / full).tolist(),
    "variance_ratio": (
      late["variance"] / late["batch_variance"][:, None]
    ).tolist(),
    "cosine": late["cosine"].tolist(),
  }


def convergence(context: bench_lib.Context) -> dict[str, Any]:
  r"""The mean squared gradient norm against the steps, and its fitted rate.

  The theory (Li et al., theorem 3) lets learning rate and radius fall by
  :math:`1 / \sqrt{t}` and bounds the mean over :math:`T` steps by
  :math:`O(\log T / \sqrt{T})`.
  """
  steps = 64 if context.is_quick else 4096
  seeds = list(context.seeds)
  problem = _Problem(context, seeds)
  every = 8
  arms = {
    "SGD": None,
    "SAM": fsam_optax.sam_perturbation,
    "F-SAM": bench_lib.fsam,
  }
  falling = lambda value: lambda t: value / jnp.sqrt(t + 1.0)
  results, rows, lines = {}, [], []
  points = 2 ** np.arange(4, int(np.log2(steps)) + 1)
  for name, perturbation_of in arms.items():
    tick = context.progress(name, 1)
    perturbation = (
      optax.set_to_zero()
      if perturbation_of is None
      else perturbation_of(falling(0.5))
    )
    norms = _gradient_norms(
      context, problem, perturbation, falling(0.1), steps, every
    )
    tick()
    means = np.cumsum(norms, axis=1) / np.arange(1, norms.shape[1] + 1)
    at = means[:, points // every - 1]
    late = points >= points[-1] // 16
    slopes = [
      np.polyfit(np.log(points[late]), np.log(row[late]), 1)[0]
      if np.all(np.isfinite(row))
      else np.nan
      for row in at
    ]
    results[name] = {
      "steps": points.tolist(),
      "mean_squared_norm": at.tolist(),
      "slopes": [float(slope) for slope in slopes],
    }
    rows.append(
      [
        name,
        *(bench_lib.number(at[:, i]) for i in (0, len(points) // 2, -1)),
        bench_lib.number(slopes),
      ]
    )
    lines.append(bench_lib.series(name, points.tolist(), at.T))
  chosen = [points[0], points[len(points) // 2], points[-1]]
  return {
    "results": results,
    "tables": [
      {
        "header": [
          "",
          *(f"mean squared norm over {t} steps" for t in chosen),
          "fitted rate",
        ],
        "rows": rows,
      }
    ],
    "panels": [
      {
        "xlabel": "steps",
        "ylabel": "mean squared norm of the full gradient",
        "is_log": True,
        "is_log_y": True,
        "series": lines,
      }
    ],
  }


def _gradient_norms(context, problem, perturbation, rate, steps, every):
  """Squared norms of the full gradient at every so many steps of each run."""
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
      carry, _ = jax.lax.scan(step, carry, start + jnp.arange(every))
      return carry, optax.tree.norm(full, squared=True)

    start = params, tx.init(params), perturbation.init(params)
    return jax.lax.scan(stretch, start, jnp.arange(0, steps, every))[1]

  norms = jax.jit(jax.vmap(run))(
    problem.params,
    problem.x,
    problem.y,
    jax.random.split(jax.random.key(1), len(problem.seeds)),
  )
  return np.asarray(norms, np.float64)


class _Problem:
  """Initial parameters and training rows of some seeds, one leading axis."""

  def __init__(self, context, seeds):
    self.seeds = seeds
    self.model = models.create(context.model, context.pool.classes)
    bench = bench_lib.Bench(context, {"SGD": bench_lib.SGD})
    splits = bench.splits(seeds)
    found = [
      bench.trainer.training_data(splits, run) for run in range(len(seeds))
    ]
    self.x = jnp.stack([rows["x"] for rows in found])
    self.y = jnp.stack([rows["y"] for rows in found])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    self.params = jax.vmap(
      lambda key: self.model.init(key, self.x[0, :1])["params"]
    )(keys)
    self.loss = functools.partial(_loss, self.model)


def _loss(model, params, batch):
  logits = model.apply({"params": params}, batch["x"])
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch["y"]
  ).mean()

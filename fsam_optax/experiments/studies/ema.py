"""The study of the average: how well it tracks the full gradient.

One run of F-SAM carries two averages for every lmbda, of the batch gradients
and of the full gradients. The distance of the second from the full gradient is
the bias, the distance between the two the variance. A third average, kept in
bfloat16, shows what its rounding adds.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import ascents

_LMBDAS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
_RATES = (0.01, 0.02, 0.04)
_SAMPLINGS = {"epoch-wise": False, "i.i.d.": True}
# The tuned values of F-SAM; the tuned rate is the last.
_RHO, _DECAY = 0.28, 0.02
_LABELS = {
  "error": "squared error / full gradient's square",
  "bias": "squared bias / full gradient's square",
  "variance": "variance / full gradient's square",
  "cosine": "cosine with the full gradient",
}


def _run(lab: Lab) -> dict[str, Any]:
  steps = lab.epochs * (lab.pool.train_size // lab.batch_size)
  see = functools.partial(_see, first=steps // 10)
  arm = arms.Arm(
    lambda rho: ascents.with_memory(arms.fsam(rho), _start, see),
    make_step=ascents.step_on_other_rows,
    sees_more=True,
    watch=_late,
  )
  lab, results = lab.at(arms={"F-SAM": arm}), {}
  for sampling, is_iid in _SAMPLINGS.items():
    at_sampling = lab.at(trainer_options={"is_iid": is_iid})
    for rate in _RATES:
      results[f"{sampling}, {rate:g}"] = at_sampling.run(
        "F-SAM", Point(rate, _RHO, _DECAY), lab.seeds, sampling
      )
  return {
    "results": results,
    "tables": [_table(results)],
    "panels": [
      figures.panel(
        "lmbda",
        [
          figures.line(setting, _LMBDAS, np.array(row[what]).T)
          for setting, row in results.items()
        ],
        label,
        yscale="linear" if what == "cosine" else "log",
      )
      for what, label in _LABELS.items()
    ],
  }


def _start(params: Any) -> dict[str, Any]:
  vector, _ = ravel_pytree(params)
  zeros = jnp.zeros((len(_LMBDAS), len(vector)))
  sums = jax.eval_shape(_measure, zeros, zeros, zeros[0], zeros[0])
  return {
    "averages": zeros,
    "expected": zeros,
    "narrow": [_narrow(lmbda).init(vector) for lmbda in _LMBDAS],
    "strayed": jnp.zeros(len(_LMBDAS)),
    "sums": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums),
  }


def _see(seen, count, gradient, ascent, gradient_on, *, first: int):
  """The averages of a step, and the sums of their errors after the first."""
  vector, _ = ravel_pytree(gradient)
  full, _ = ravel_pytree(gradient_on("whole"))
  decays = jnp.array(_LMBDAS)[:, None]
  mix = lambda m, g: jnp.where(count == 0, g, decays * m + (1 - decays) * g)
  averages = mix(seen["averages"], vector)
  expected = mix(seen["expected"], full)
  measured = _measure(averages, expected, vector, full)
  sums = jax.tree.map(
    lambda x, y: jnp.where(count < first, x, x + y), seen["sums"], measured
  )
  narrow: list[Any] = [
    _narrow(lmbda).update(vector, state)[1]
    for lmbda, state in zip(_LMBDAS, seen["narrow"], strict=True)
  ]
  norm = functools.partial(jnp.linalg.norm, axis=-1)
  distance = norm(jnp.stack([x.ema for x in narrow]) - averages)
  seen = {
    "averages": averages,
    "expected": expected,
    "narrow": narrow,
    "strayed": jnp.maximum(seen["strayed"], distance / norm(averages)),
    "sums": sums,
  }
  return ascent, seen


def _narrow(lmbda: float) -> optax.GradientTransformation:
  return fsam_optax.subtract_gradient_ema(
    lmbda=lmbda, accumulator_dtype=jnp.bfloat16
  )


def _measure(averages, expected, vector, full) -> dict[str, jax.Array]:
  square = lambda v: jnp.sum(v**2, axis=-1)
  # Summed over the steps: each cosine is of a step, the others are ratios.
  scale = jnp.sqrt(square(averages) * square(full) + 1e-30)
  return {
    "error": square(averages - full),
    "bias": square(expected - full),
    "variance": square(averages - expected),
    "batch_variance": square(vector - full),
    "full": square(full),
    "cosine": averages @ full / scale,
    "steps": jnp.ones([]),
  }


def _late(state: ascents.MemoryState) -> dict[str, Any]:
  """Means after the first tenth, in units of the full gradient's square."""
  sums = jax.tree.map(lambda x: np.asarray(x, np.float64), state.memory["sums"])
  over = lambda what, unit: (sums[what] / sums[unit][:, None]).tolist()
  return {
    **{x: over(x, "full") for x in ("error", "bias", "variance")},
    "variance_ratio": over("variance", "batch_variance"),
    "cosine": over("cosine", "steps"),
    "strayed": np.asarray(state.memory["strayed"]).tolist(),
  }


def _table(results: dict[str, Any]) -> dict[str, Any]:
  """A row a decay, of means alone."""
  cell = lambda setting, what, i: {
    "value": float(np.mean([x[i] for x in results[setting][what]]))
  }
  rows = [
    [
      lmbda,
      cell("i.i.d., 0.04", "variance_ratio", i),
      # What independent gradients would leave of the variance of one.
      round((1 - lmbda) / (1 + lmbda), 3),
      cell("epoch-wise, 0.04", "variance_ratio", i),
      *(cell(f"epoch-wise, {rate:g}", "error", i) for rate in _RATES),
      cell("epoch-wise, 0.04", "cosine", i),
      cell("epoch-wise, 0.04", "strayed", i),
    ]
    for i, lmbda in enumerate(_LMBDAS)
  ]
  errors = [f"squared error at rate {rate:g}" for rate in _RATES]
  ratios = ["i.i.d.: variance / batch's", "(1 - l) / (1 + l)", "epoch-wise"]
  last = ["cosine at 0.04", "bfloat16 strays by, worst step"]
  return {"header": ["lmbda", *ratios, *errors, *last], "rows": rows}


STUDY = Study(
  "ema", "does the average track the full gradient?", run=_run, seeds=8
)

"""The training problem of some seeds, for studies that watch every step."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp
import optax

from fsam_optax.experiments import networks
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib


class Problem:
  """First parameters and training rows of ``S`` seeds, and their loss.

  Attributes:
    x: training rows, shape ``[S, N, ...]``.
    y: their labels after the noise, shape ``[S, N]``.
    params: leaves of shape ``[S, ...]``.
    loss: of the parameters and a batch of ``"x"`` and ``"y"``.
  """

  def __init__(self, context: arms_lib.Context, seeds: Sequence[int]) -> None:
    """Draws rows and parameters.

    Args:
      context: what to train on.
      seeds: of the splits and the initializations.
    """
    model = networks.REGISTRY[context.model].create(context.pool.classes)
    contest = contest_lib.Contest(context, {"SGD": arms_lib.SGD})
    splits = contest.splits(seeds)
    found = [
      contest.trainer.training_data(splits, run) for run in range(len(seeds))
    ]
    self.x = jnp.stack([rows["x"] for rows in found])
    self.y = jnp.stack([rows["y"] for rows in found])
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    self.params = jax.vmap(
      lambda key: model.init(key, self.x[0, :1])["params"]
    )(keys)
    self.loss = functools.partial(_loss, model)

  def over_seeds(self, run: Any, seed: int) -> Any:
    """Calls ``run(params, x, y, key)`` for all seeds at once, compiled.

    Args:
      run: a function of one seed's arrays.
      seed: of the keys.

    Returns:
      What it returns, with a leading axis of seeds.
    """
    keys = jax.random.split(jax.random.key(seed), len(self.x))
    return jax.jit(jax.vmap(run))(self.params, self.x, self.y, keys)


def _loss(model: Any, params: Any, batch: Any) -> jax.Array:
  logits = model.apply({"params": params}, batch["x"])
  return optax.losses.softmax_cross_entropy_with_integer_labels(
    logits, batch["y"]
  ).mean()

"""One run of one seed, as a function of arrays: what the trainer vmaps.

Nothing here has an axis of runs. Each function takes the rows of the pool, and
of its own run the split, the learning rate, the radius and the weight decay.
"""

from collections.abc import Mapping
import functools
from typing import Any, Callable, Optional, cast

from flax import linen as nn
import jax
from jax import numpy as jnp
import optax

import fsam_optax
from fsam_optax.experiments.common import optimizers

Perturbation = Callable[[Any], optax.GradientTransformation]
MOMENTUM = 0.9
_ROWS_AT_ONCE = 250  # Of each run, in the passes that measure accuracy.


class OneRun:
  """The functions of one run: its first state, an epoch, its accuracy."""

  def __init__(
    self,
    model: nn.Module,
    make_step: Callable[[Any], Any],
    perturbations: Mapping[str, Perturbation],
    *,
    sigma: float,
    lmbda: float,
    epochs: int,
    steps: int,
    batch_size: int,
    with_other_rows: bool,
  ) -> None:
    """Nothing is computed yet.

    Args:
      model: a module from inputs of shape ``[B, ...]`` to logits.
      make_step: from the loss to the train step.
      perturbations: further optimizers by name, each as a function from its
        radius to its ascent.
      sigma: of F-SAM.
      lmbda: of F-SAM.
      epochs: passes over the training rows.
      steps: of an epoch.
      batch_size: rows a step.
      with_other_rows: whether a batch holds ``"whole"`` and ``"other"``; see
        :class:`fsam_optax.experiments.seeds.trainer.Trainer`.
    """
    self._model = model
    self._perturbations = dict(perturbations)
    self._sigma, self._lmbda = sigma, lmbda
    self._epochs, self._steps = epochs, steps
    self._batch_size = batch_size
    self._with_other_rows = with_other_rows
    self._step = make_step(self.loss)

  def loss(self, params, model_state, batch, rng):
    """Cross-entropy, the mean over the rows, as a train step takes it."""
    del rng
    logits = self._logits(params, batch["x"])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch["y"]
    )
    return jnp.mean(losses), (model_state, {})

  def init_params(self, optimizer, pool, seed):
    """The first parameters: of the seed alone, so that optimizers share them.

    Args:
      optimizer: ignored.
      pool: inputs and labels of all rows.
      seed: shape ``[]``.

    Returns:
      The parameters.
    """
    del optimizer
    key, _ = jax.random.split(jax.random.key(seed))
    return self._model.init(key, pool[0][:1])["params"]

  def init(self, optimizer, pool, params, run):
    """The first state, from the parameters and what the run is.

    Args:
      optimizer: its name.
      pool: ignored.
      params: the first parameters.
      run: split, learning rate, radius and weight decay.

    Returns:
      The state.
    """
    del pool
    _, learning_rate, rho, weight_decay = run
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=params,
      tx=self._tx(learning_rate, weight_decay),
      perturbation=self._perturbation(optimizer, rho),
    )
    return _without_functions(state)

  def epoch(self, optimizer, pool, state, run):
    """The steps over one permutation of the training rows.

    Args:
      optimizer: its name.
      pool: inputs and labels of all rows.
      state: of before.
      run: split, learning rate, radius and weight decay.

    Returns:
      The state, and whether every loss was finite.
    """
    splits, learning_rate, rho, weight_decay = run
    # The two transformations close over traced rates. They are static fields
    # of the state, so they come in here and do not leave the compiled call.
    state = state.replace(
      tx=self._tx(learning_rate, weight_decay),
      perturbation=self._perturbation(optimizer, rho),
    )
    whole = jnp.arange(splits.train_rows.shape[0])
    order = self._order(splits, state.step)
    other = jnp.roll(order, 1, axis=0)  # The batch before, in this order.
    rows_at = functools.partial(_training_rows, pool, splits)

    def step(state, positions):
      own, another = positions
      batch: dict[str, Any] = rows_at(own)
      if self._with_other_rows:
        batch |= {"whole": rows_at(whole), "other": rows_at(another)}
      state, metrics = self._step(state, batch)
      return state, jnp.isfinite(metrics["loss"])

    state, is_finite = jax.lax.scan(step, state, (order, other))
    return _without_functions(state), jnp.all(is_finite)

  def hits(self, optimizer, pool, params, scale, rows, labels):
    """How many rows are classified as labeled, a few at a time.

    Args:
      optimizer: ignored.
      pool: inputs and labels of all rows.
      params: the parameters.
      scale: mean and standard deviation of the training rows.
      rows: places in the pool, shape ``[N]``.
      labels: shape ``[N]``.

    Returns:
      Shape ``[]``, int32.
    """
    del optimizer
    padding = (0, -len(rows) % _ROWS_AT_ONCE)
    rows = jnp.pad(rows, padding).reshape(-1, _ROWS_AT_ONCE)
    # No prediction is -1, so the padding never counts.
    labels = jnp.pad(labels, padding, constant_values=-1).reshape(rows.shape)

    def hits(chunk):
      rows, labels = chunk
      logits = self._logits(params, _inputs(pool, scale, rows))
      return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    return jnp.sum(jax.lax.map(hits, (rows, labels)))

  def _logits(self, params, x) -> jax.Array:
    return cast(jax.Array, self._model.apply({"params": params}, x))

  def _order(self, splits, step) -> jax.Array:
    """Positions of the training rows, shape `[steps, batch_size]`.

    The key is of the seed and the step alone: the batches of a seed are the
    same for all optimizers, which is half of what pairs them.
    """
    _, key = jax.random.split(jax.random.key(splits.seed))
    order = jax.random.permutation(
      jax.random.fold_in(key, step), splits.train_rows.shape[0]
    )
    order = order[: self._steps * self._batch_size]
    return order.reshape(self._steps, self._batch_size)

  def _tx(self, learning_rate, weight_decay) -> optax.GradientTransformation:
    # By hand: optax.cosine_decay_schedule takes no traced learning rate.
    steps = self._epochs * self._steps
    cosine = lambda count: (
      learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
    )
    return optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.sgd(cosine, momentum=MOMENTUM),
    )

  def _perturbation(
    self, optimizer, rho
  ) -> Optional[optax.GradientTransformation]:
    if optimizer in self._perturbations:
      return self._perturbations[optimizer](rho)
    return optimizers.perturbation(
      optimizer, rho=rho, sigma=self._sigma, lmbda=self._lmbda
    )


def _training_rows(pool, splits, positions) -> dict[str, Any]:
  scale = (splits.mean, splits.standard_deviation)
  return {
    "x": _inputs(pool, scale, splits.train_rows[positions]),
    "y": splits.train_labels[positions],
  }


def _inputs(pool, scale, rows) -> jax.Array:
  mean, standard_deviation = scale
  return (pool[0][rows] - mean) / standard_deviation


def _without_functions(state: Any) -> Any:
  return state.replace(tx=None, perturbation=None)

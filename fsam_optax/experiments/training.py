"""The training: many runs of one optimizer at once, each on its own split."""

import time
from typing import Any, Callable, NamedTuple, Optional, cast

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import data

OPTIMIZERS = ("sgd", "sam", "fsam")
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
_ROWS_AT_ONCE = 250  # Of each run, in the passes that measure accuracy.


class Outcome(NamedTuple):
  """What came of ``R`` runs. Accuracies are in percent, float64.

  Attributes:
    test_accuracy: after the last epoch, shape ``[R]``.
    validation_accuracy: after the last epoch, shape ``[R]``.
    train_accuracy: after the last epoch and against the labels it was trained
      on, the noisy ones included, shape ``[R]``.
    curve: validation accuracy after each epoch, shape ``[epochs, R]``; empty
      where it was not asked for.
    diverged: whether a loss or a parameter was not finite, shape ``[R]``, bool.
    seconds: wall-clock time, compilation included.
    compile_seconds: the part of it that tracing and compiling took.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  train_accuracy: np.ndarray
  curve: np.ndarray
  diverged: np.ndarray
  seconds: float
  compile_seconds: float


def perturbation_of(
  optimizer: str,
  rho: optax.ScalarOrSchedule,
  sigma: float,
  lmbda: float,
) -> Optional[optax.GradientTransformation]:
  """The ascent of ``"sam"`` or ``"fsam"``; None for ``"sgd"``."""
  if optimizer == "sgd":
    return None
  if optimizer == "sam":
    return fsam_optax.sam_perturbation(rho)
  return fsam_optax.friendly_perturbation(rho, sigma, lmbda)


class Trainer:
  """Trains runs that differ in seed, learning rate and radius together.

  The runs are vmapped over a scan of train steps, an epoch a call. The step
  is that of :func:`fsam_optax.make_train_step`; the base optimizer is SGD with
  momentum 0.9, weight decay 5e-4 added to the gradient and a cosine from the
  learning rate to 0. Each epoch takes its batches from a new permutation of
  the training rows, without replacement; rows that fill no whole batch wait
  for another epoch.

  Initialisation, batches, split and noise come from the seed of a run alone,
  so those of two optimizers are paired. Compiled programs are kept for further
  calls with as many runs.
  """

  def __init__(
    self,
    model: nn.Module,
    pool: data.Pool,
    optimizer: str,
    *,
    sigma: float,
    lmbda: float,
    epochs: int,
    batch_size: int,
  ):
    """Prepares to train.

    Args:
      model: a module from inputs of shape ``[B, ...]`` to logits.
      pool: the data set.
      optimizer: one of :data:`OPTIMIZERS`.
      sigma: of F-SAM.
      lmbda: of F-SAM.
      epochs: passes over the training rows, positive.
      batch_size: rows a step, at most the training rows.
    """
    self._model = model
    self._optimizer = optimizer
    self._sigma = sigma
    self._lmbda = lmbda
    self._epochs = epochs
    self._batch_size = batch_size
    self._steps = pool.train_size // batch_size
    self._pool = (jnp.asarray(pool.x), jnp.asarray(pool.y))
    self._step = fsam_optax.make_train_step(
      self._loss, skip_nonfinite=False, metrics=(), jit=False
    )
    self._compiled: dict[Any, Any] = {}

  def __call__(
    self,
    splits: data.Splits,
    learning_rate: np.ndarray,
    rho: np.ndarray,
    *,
    with_curve: bool = True,
    on_epoch: Callable[[], None] = lambda: None,
  ) -> Outcome:
    """Trains and tests.

    Args:
      splits: one split a run, leading axis ``R``.
      learning_rate: at the first step, shape ``[R]``.
      rho: radius, shape ``[R]``; SGD ignores it.
      with_curve: whether to measure the validation accuracy every epoch.
      on_epoch: called after each epoch, for a progress bar.

    Returns:
      The outcome of every run. The test rows are looked at once, by the final
      parameters.
    """
    start = time.perf_counter()
    compile_seconds = 0.0

    def call(name, fn, *args, donate=()):
      nonlocal compile_seconds
      key = (name, len(learning_rate))
      if key not in self._compiled:
        begin = time.perf_counter()
        jitted = jax.jit(fn, donate_argnums=donate)
        self._compiled[key] = jitted.lower(*args).compile()
        compile_seconds += time.perf_counter() - begin
      return self._compiled[key](*args)

    runs = jax.tree.map(
      jnp.asarray,
      (
        splits,
        np.asarray(learning_rate, np.float32),
        np.asarray(rho, np.float32),
      ),
    )
    splits = runs[0]
    over_runs = lambda fn: (
      lambda *args: jax.vmap(lambda *one: fn(self._pool, *one))(*args)
    )
    state = call("init", over_runs(self._init), runs)
    validate = lambda s: call(
      "validate",
      over_runs(self._hits),
      s.params,
      splits,
      splits.validation_rows,
      self._pool[1][splits.validation_rows],
    )
    curve, losses_finite = [], []
    for _ in range(self._epochs):
      state, is_finite = call(
        "epoch", over_runs(self._epoch), state, runs, donate=0
      )
      losses_finite.append(is_finite)
      if with_curve:
        curve.append(validate(state))
      jax.block_until_ready(state)
      on_epoch()
    test = call(
      "test",
      over_runs(self._hits),
      state.params,
      splits,
      splits.test_rows,
      self._pool[1][splits.test_rows],
    )
    train = call(
      "train",
      over_runs(self._hits),
      state.params,
      splits,
      splits.train_rows,
      splits.train_labels,
    )
    params_finite = call("finite", jax.vmap(_is_finite), state.params)
    percent = lambda hits, rows: (
      100 * np.asarray(hits, np.float64) / rows.shape[1]
    )
    return Outcome(
      test_accuracy=percent(test, splits.test_rows),
      validation_accuracy=percent(validate(state), splits.validation_rows),
      train_accuracy=percent(train, splits.train_rows),
      curve=np.array([percent(h, splits.validation_rows) for h in curve]),
      diverged=~np.all([*losses_finite, params_finite], axis=0),
      seconds=time.perf_counter() - start,
      compile_seconds=compile_seconds,
    )

  def _logits(self, params, x) -> jax.Array:
    return cast(jax.Array, self._model.apply({"params": params}, x))

  def _loss(self, params, model_state, batch, rng):
    del rng
    logits = self._logits(params, batch["x"])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch["y"]
    )
    return jnp.mean(losses), (model_state, {})

  def _init(self, pool, run):
    splits, learning_rate, rho = run
    key, _ = jax.random.split(jax.random.key(splits.seed))
    params = self._model.init(key, pool[0][:1])["params"]
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=params,
      tx=self._tx(learning_rate),
      perturbation=self._perturbation(rho),
    )
    return _without_functions(state)

  def _epoch(self, pool, state, run):
    """One run's steps over one permutation of its training rows."""
    splits, learning_rate, rho = run
    # The two transformations close over traced rates. They are static fields
    # of the state, so they come in here and do not leave the compiled call.
    state = state.replace(
      tx=self._tx(learning_rate), perturbation=self._perturbation(rho)
    )
    _, key = jax.random.split(jax.random.key(splits.seed))
    order = jax.random.permutation(
      jax.random.fold_in(key, state.step), splits.train_rows.shape[0]
    )
    order = order[: self._steps * self._batch_size]

    def step(state, positions):
      batch = {
        "x": _inputs(pool, splits, splits.train_rows[positions]),
        "y": splits.train_labels[positions],
      }
      state, metrics = self._step(state, batch)
      return state, jnp.isfinite(metrics["loss"])

    state, is_finite = jax.lax.scan(
      step, state, order.reshape(self._steps, self._batch_size)
    )
    return _without_functions(state), jnp.all(is_finite)

  def _hits(self, pool, params, splits, rows, labels):
    """How many rows one run classifies as labelled, a few at a time."""
    padding = (0, -len(rows) % _ROWS_AT_ONCE)
    rows = jnp.pad(rows, padding).reshape(-1, _ROWS_AT_ONCE)
    # No prediction is -1, so the padding never counts.
    labels = jnp.pad(labels, padding, constant_values=-1).reshape(rows.shape)

    def hits(chunk):
      rows, labels = chunk
      logits = self._logits(params, _inputs(pool, splits, rows))
      return jnp.sum(jnp.argmax(logits, axis=-1) == labels)

    return jnp.sum(jax.lax.map(hits, (rows, labels)))

  def _tx(self, learning_rate):
    steps = self._epochs * self._steps
    cosine = lambda count: (
      learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
    )
    return optax.chain(
      optax.add_decayed_weights(WEIGHT_DECAY),
      optax.sgd(cosine, momentum=MOMENTUM),
    )

  def _perturbation(self, rho):
    return perturbation_of(self._optimizer, rho, self._sigma, self._lmbda)


def _without_functions(state):
  return state.replace(tx=None, perturbation=None)


def _inputs(pool, splits, rows):
  return (pool[0][rows] - splits.mean) / splits.deviation


def _is_finite(tree):
  return jnp.all(
    jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)])
  )

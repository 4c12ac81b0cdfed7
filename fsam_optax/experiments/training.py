"""The training: many runs of one optimizer at once, each on its own split."""

from collections.abc import Mapping
import functools
import time
from typing import Any, Callable, NamedTuple, Optional, cast

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import data

Perturbation = Callable[[Any], optax.GradientTransformation]
OPTIMIZERS = ("sgd", "sam", "fsam")
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
_UNOPTIMIZED: Any = {"xla_backend_optimization_level": 0}
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
    params: after the last epoch, leaves of shape ``[R, ...]``.
    seconds: wall-clock time, compilation included.
    compile_seconds: the part of it that tracing and compiling took.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  train_accuracy: np.ndarray
  curve: np.ndarray
  diverged: np.ndarray
  params: Any
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
  """Trains runs of one optimizer that differ in seed and rates together.

  The runs are vmapped over a scan of train steps, an epoch a call. The step
  is that of :func:`fsam_optax.make_train_step`; the base optimizer is SGD with
  momentum 0.9, weight decay 5e-4 added to the gradient and a cosine from the
  learning rate to 0. Each epoch takes its batches from a new permutation of
  the training rows, without replacement; rows that fill no whole batch wait
  for another epoch.

  Initialisation, batches, split and noise come from the seed of a run alone,
  so those of two optimizers are paired. Compiled programs are kept for further
  calls with as many runs; those that measure accuracy serve all optimizers.
  """

  def __init__(
    self,
    model: nn.Module,
    pool: data.Pool,
    *,
    sigma: float,
    lmbda: float,
    epochs: int,
    batch_size: int,
    num_replicas: int = 1,
    perturbations: Optional[Mapping[str, Perturbation]] = None,
    make_step: Callable[..., Any] = fsam_optax.make_train_step,
    with_other_rows: bool = False,
    optimize: bool = True,
    **step_options: Any,
  ):
    """Prepares to train.

    Args:
      model: a module from inputs of shape ``[B, ...]`` to logits.
      pool: the data set.
      sigma: of F-SAM.
      lmbda: of F-SAM.
      epochs: passes over the training rows, positive.
      batch_size: rows a step, at most the training rows.
      num_replicas: number of data-parallel replicas to emulate, a divisor of
        the batch size. Each has successive rows of every batch.
      perturbations: further optimizers by name, each as a function from its
        radius to its ascent.
      make_step: :func:`fsam_optax.make_train_step`, or what takes its
        arguments and returns such a step.
      with_other_rows: whether a batch holds, beside its ``"x"`` and ``"y"``,
        such a pair under ``"whole"``, all training rows, and one under
        ``"other"``, as many rows of another batch.
      optimize: whether XLA is to optimize the steps; what trains for a few
        steps alone is done sooner without.
      **step_options: for ``make_step``.
    """
    self._model = model
    self._sigma = sigma
    self._lmbda = lmbda
    self._perturbations = dict(perturbations or {})
    self._optimize = optimize
    self._with_other_rows = with_other_rows
    self._epochs = epochs
    self._batch_size = batch_size
    self._steps = pool.train_size // batch_size
    self._pool = (jnp.asarray(pool.x), jnp.asarray(pool.y))
    step = functools.partial(
      make_step,
      self._loss,
      skip_nonfinite=False,
      metrics=(),
      jit=False,
      **step_options,
    )
    if num_replicas == 1:
      self._step = step()
    else:
      self._step = fsam_optax.group_step(
        step(axis_name="replica"), num_replicas, "replica"
      )
    self._compiled: dict[Any, Any] = {}

  def __call__(
    self,
    optimizer: str,
    splits: data.Splits,
    learning_rate: np.ndarray,
    rho: np.ndarray,
    *,
    with_curve: bool = True,
    on_epoch: Callable[[], None] = lambda: None,
  ) -> Outcome:
    """Trains and tests.

    Args:
      optimizer: one of :data:`OPTIMIZERS`, or a further one of the trainer.
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
    self._compile_seconds = 0.0
    runs = jax.tree.map(
      jnp.asarray,
      (
        splits,
        np.asarray(learning_rate, np.float32),
        np.asarray(rho, np.float32),
      ),
    )
    splits = runs[0]
    params = self._call(self._init_params, None, splits.seed, is_hot=False)
    state = self._call(self._init, optimizer, params, runs, is_hot=False)
    curve, is_finite = [], []
    for _ in range(self._epochs):
      state, losses_finite = self._call(
        self._epoch, optimizer, state, runs, donate=1
      )
      is_finite.append(losses_finite)
      if with_curve:
        curve.append(self._accuracy(state, splits, splits.validation_rows))
      jax.block_until_ready(state)
      on_epoch()
    for leaf in jax.tree.leaves(state.params):
      rows = np.asarray(leaf).reshape(len(splits.seed), -1)
      is_finite.append(np.all(np.isfinite(rows), axis=1))
    return Outcome(
      test_accuracy=self._accuracy(state, splits, splits.test_rows),
      validation_accuracy=self._accuracy(state, splits, splits.validation_rows),
      train_accuracy=self._accuracy(
        state, splits, splits.train_rows, splits.train_labels
      ),
      curve=np.array(curve),
      diverged=~np.all(is_finite, axis=0),
      params=state.params,
      seconds=time.perf_counter() - start,
      compile_seconds=self._compile_seconds,
    )

  def _call(self, fn, optimizer, *args, donate=(), is_hot=True):
    """Calls `fn(optimizer, pool, *args)`, `args` vmapped over the runs.

    What runs once is not worth optimizing: random numbers take longer to
    compile than a train step.
    """
    key = (
      fn.__name__,
      optimizer,
      tuple(jnp.shape(x) for x in jax.tree.leaves(args)),
    )
    if key not in self._compiled:
      start = time.perf_counter()
      vmapped = lambda pool, *args: jax.vmap(
        functools.partial(fn, optimizer, pool)
      )(*args)
      jitted = jax.jit(vmapped, donate_argnums=donate)
      self._compiled[key] = jitted.lower(self._pool, *args).compile(
        None if is_hot and self._optimize else _UNOPTIMIZED
      )
      self._compile_seconds += time.perf_counter() - start
    return self._compiled[key](self._pool, *args)

  def loss(self, params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a batch of ``"x"`` and ``"y"``, mean over its rows."""
    return self._loss(params, None, batch, None)[0]

  def training_data(self, splits: data.Splits, run: int) -> dict[str, Any]:
    """The training rows of one run as one batch, its noisy labels included."""
    x = np.asarray(self._pool[0])[splits.train_rows[run]]
    return {
      "x": (x - splits.mean[run]) / splits.deviation[run],
      "y": splits.train_labels[run],
    }

  def _accuracy(self, state, splits, rows, labels=None) -> np.ndarray:
    """Percent of the rows classified as labelled, shape `[R]`, float64."""
    labels = self._pool[1][rows] if labels is None else labels
    scale = (splits.mean, splits.deviation)
    hits = self._call(self._hits, None, state.params, scale, rows, labels)
    return 100 * np.asarray(hits, np.float64) / rows.shape[1]

  def _logits(self, params, x) -> jax.Array:
    return cast(jax.Array, self._model.apply({"params": params}, x))

  def _loss(self, params, model_state, batch, rng):
    del rng
    logits = self._logits(params, batch["x"])
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch["y"]
    )
    return jnp.mean(losses), (model_state, {})

  def _init_params(self, optimizer, pool, seed):
    del optimizer
    key, _ = jax.random.split(jax.random.key(seed))
    return self._model.init(key, pool[0][:1])["params"]

  def _init(self, optimizer, pool, params, run):
    del pool
    _, learning_rate, rho = run
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=params,
      tx=self._tx(learning_rate),
      perturbation=self._perturbation(optimizer, rho),
    )
    return _without_functions(state)

  def _epoch(self, optimizer, pool, state, run):
    """One run's steps over one permutation of its training rows."""
    splits, learning_rate, rho = run
    scale = (splits.mean, splits.deviation)
    # The two transformations close over traced rates. They are static fields
    # of the state, so they come in here and do not leave the compiled call.
    state = state.replace(
      tx=self._tx(learning_rate),
      perturbation=self._perturbation(optimizer, rho),
    )
    _, key = jax.random.split(jax.random.key(splits.seed))
    order = jax.random.permutation(
      jax.random.fold_in(key, state.step), splits.train_rows.shape[0]
    )
    order = order[: self._steps * self._batch_size]

    rows_at = lambda positions: {
      "x": _inputs(pool, scale, splits.train_rows[positions]),
      "y": splits.train_labels[positions],
    }
    order = order.reshape(self._steps, self._batch_size)
    other = jnp.roll(order, 1, axis=0)  # The batch before, in this order.
    whole = jnp.arange(splits.train_rows.shape[0])

    def step(state, positions):
      own, another = positions
      batch: dict[str, Any] = rows_at(own)
      if self._with_other_rows:
        batch |= {"whole": rows_at(whole), "other": rows_at(another)}
      state, metrics = self._step(state, batch)
      return state, jnp.isfinite(metrics["loss"])

    state, is_finite = jax.lax.scan(step, state, (order, other))
    return _without_functions(state), jnp.all(is_finite)

  def _hits(self, optimizer, pool, params, scale, rows, labels):
    """How many rows one run classifies as labelled, a few at a time."""
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

  def _tx(self, learning_rate):
    steps = self._epochs * self._steps
    cosine = lambda count: (
      learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
    )
    return optax.chain(
      optax.add_decayed_weights(WEIGHT_DECAY),
      optax.sgd(cosine, momentum=MOMENTUM),
    )

  def _perturbation(self, optimizer, rho):
    if optimizer in self._perturbations:
      return self._perturbations[optimizer](rho)
    return perturbation_of(optimizer, rho, self._sigma, self._lmbda)


def _without_functions(state):
  return state.replace(tx=None, perturbation=None)


def _inputs(pool, scale, rows):
  mean, deviation = scale
  return (pool[0][rows] - mean) / deviation

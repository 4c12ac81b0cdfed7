"""The trainer: many runs of one optimizer at once, each on its own split."""

from collections.abc import Mapping
import functools
import time
from typing import Any, Callable, NamedTuple, Optional

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

import fsam_optax
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds.one_run import OneRun
from fsam_optax.experiments.seeds.one_run import Perturbation

_UNOPTIMIZED: Any = {"xla_backend_optimization_level": 0}


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
    perturbation_state: after the last epoch, leaves of shape ``[R, ...]``.
    seconds: wall-clock time, compilation included.
    compile_seconds: the part of it that tracing and compiling took.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  train_accuracy: np.ndarray
  curve: np.ndarray
  diverged: np.ndarray
  params: Any
  perturbation_state: Any
  seconds: float
  compile_seconds: float


class Trainer:
  """Trains runs of one optimizer that differ in seed and rates together.

  The runs are vmapped over a scan of train steps, an epoch a call. The step
  is that of :func:`fsam_optax.make_train_step`; the base optimizer is SGD with
  momentum 0.9, weight decay added to the gradient and a cosine from the
  learning rate to 0. Each epoch takes its batches from a new permutation of
  the training rows, without replacement; rows that fill no whole batch wait
  for another epoch.

  Initialization, batches, split and noise come from the seed of a run alone,
  so those of two optimizers are paired: what is left of their difference is
  the optimizers'. Compiled programs are kept for further calls with as many
  runs; those that measure accuracy serve all optimizers.

  Attributes:
    epochs: passes over the training rows.
  """

  def __init__(
    self,
    model: nn.Module,
    pool: splits_lib.Pool,
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
    self._optimize, self.epochs = optimize, epochs
    self._pool = (jnp.asarray(pool.x), jnp.asarray(pool.y))
    self._compiled: dict[Any, Any] = {}
    self._run = OneRun(
      model,
      functools.partial(_step_of, make_step, num_replicas, step_options),
      perturbations or {},
      sigma=sigma,
      lmbda=lmbda,
      epochs=epochs,
      steps=pool.train_size // batch_size,
      batch_size=batch_size,
      with_other_rows=with_other_rows,
    )

  def __call__(
    self,
    optimizer: str,
    splits: splits_lib.Splits,
    learning_rate: np.ndarray,
    rho: np.ndarray,
    weight_decay: np.ndarray,
    *,
    with_curve: bool = True,
    on_epoch: Callable[[], None] = lambda: None,
  ) -> Outcome:
    """Trains and tests.

    Args:
      optimizer: a name of :mod:`fsam_optax.experiments.common.optimizers`, or a
        further one of the trainer.
      splits: one split a run, leading axis ``R``.
      learning_rate: at the first step, shape ``[R]``.
      rho: radius, shape ``[R]``; SGD ignores it.
      weight_decay: fraction of the weights that is added to the gradient, shape
        ``[R]``.
      with_curve: whether to measure the validation accuracy every epoch.
      on_epoch: called after each epoch, for a progress bar.

    Returns:
      The outcome of every run. The test rows are looked at once, by the final
      parameters.
    """
    start = time.perf_counter()
    self._compile_seconds = 0.0
    values = learning_rate, rho, weight_decay
    rates = (np.asarray(x, np.float32) for x in values)
    runs = jax.tree.map(jnp.asarray, (splits, *rates))
    splits = runs[0]
    params = self._call(self._run.init_params, None, splits.seed, is_hot=False)
    state = self._call(self._run.init, optimizer, params, runs, is_hot=False)
    curve, is_finite = [], []
    for _ in range(self.epochs):
      state, losses_finite = self._call(
        self._run.epoch, optimizer, state, runs, donate=1
      )
      is_finite.append(losses_finite)
      if with_curve:
        curve.append(self._accuracy(state, splits, splits.validation_rows))
      # So that the bar moves when an epoch is done, not when it is enqueued.
      jax.block_until_ready(state)
      on_epoch()
    is_finite += _are_finite(state.params, len(splits.seed))
    return Outcome(
      test_accuracy=self._accuracy(state, splits, splits.test_rows),
      validation_accuracy=self._accuracy(state, splits, splits.validation_rows),
      train_accuracy=self._accuracy(
        state, splits, splits.train_rows, splits.train_labels
      ),
      curve=np.array(curve),
      diverged=~np.all(is_finite, axis=0),
      params=state.params,
      perturbation_state=state.perturbation_state,
      seconds=time.perf_counter() - start,
      compile_seconds=self._compile_seconds,
    )

  def loss(self, params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a batch of ``"x"`` and ``"y"``, mean over its rows."""
    return self._run.loss(params, None, batch, None)[0]

  def training_data(
    self, splits: splits_lib.Splits, run: int
  ) -> dict[str, Any]:
    """The training rows of one run as one batch, its noisy labels included."""
    x = np.asarray(self._pool[0])[splits.train_rows[run]]
    return {
      "x": (x - splits.mean[run]) / splits.standard_deviation[run],
      "y": splits.train_labels[run],
    }

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

  def _accuracy(self, state, splits, rows, labels=None) -> np.ndarray:
    """Percent of the rows classified as labeled, shape `[R]`, float64."""
    labels = self._pool[1][rows] if labels is None else labels
    scale = (splits.mean, splits.standard_deviation)
    hits = self._call(self._run.hits, None, state.params, scale, rows, labels)
    return 100 * np.asarray(hits, np.float64) / rows.shape[1]


def _step_of(make_step, num_replicas, options, loss):
  """The train step, by emulated replicas where there are several."""
  step = functools.partial(
    make_step, loss, skip_nonfinite=False, metrics=(), jit=False, **options
  )
  if num_replicas == 1:
    return step()
  return fsam_optax.sharding.group_step(
    step(axis_name="replica"), num_replicas, "replica"
  )


def _are_finite(params: Any, runs: int) -> list[np.ndarray]:
  """For each leaf, which runs have nothing but finite numbers in it."""
  return [
    np.all(np.isfinite(np.asarray(leaf).reshape(runs, -1)), axis=1)
    for leaf in jax.tree.leaves(params)
  ]

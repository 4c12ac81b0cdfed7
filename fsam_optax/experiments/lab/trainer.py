"""The trainer: many runs of one arm at once, each on its own split.

Runs of one arm that differ in seed and rates are vmapped over a scan of train
steps, an epoch a call, or over one step.
"""

import dataclasses
import functools
from typing import Any, Callable, Mapping, NamedTuple, Optional

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.lab import arms as arms_lib
from fsam_optax.experiments.lab import splits as splits_lib

_ROWS_AT_ONCE = 250  # Of each run, in the passes that measure accuracy.
_UNOPTIMIZED: Any = {"xla_backend_optimization_level": 0}


class Outcome(NamedTuple):
  """What came of ``R`` runs after the last epoch.

  Attributes:
    test_accuracy: percent, shape ``[R]``, float64, as the next two.
    validation_accuracy: of the validation rows.
    curve: validation accuracy after each epoch, shape ``[R, epochs]``; empty
      where it was not asked for.
    diverged: whether a loss or a parameter was not finite, shape ``[R]``, bool.
    params: leaves of shape ``[R, ...]``.
    perturbation_state: leaves of shape ``[R, ...]``.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  curve: np.ndarray
  diverged: np.ndarray
  params: Any
  perturbation_state: Any


def descent(
  learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
  """SGD with momentum and a cosine to 0, the decay added to the gradient."""
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  return optax.chain(
    optax.add_decayed_weights(weight_decay),
    optax.sgd(schedule, momentum=arms_lib.MOMENTUM),
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
  """Trains arms that differ in their ascent.

  Each epoch takes its batches from a new permutation of the training rows; rows
  that fill no whole batch are left out. Compiled programs are kept.

  Attributes:
    model: a module from inputs of shape ``[B, ...]`` to logits.
    pool: the data set.
    arms: by name.
    epochs: passes over the training rows.
    batch_size: rows a step, at most the training rows.
    is_iid: whether each batch is drawn anew, with replacement.
    make_tx: the base optimizer, from the learning rate, the weight decay and
      the number of steps.
    augment: from the seed of a run, the step and the rows of its batch to those
      that it is trained on.
    begin: from the variables of ``R`` runs as the network initializes them,
      leaves of shape ``[R, ...]``, to those that the training begins with.
    has_curve: whether it measures the validation accuracy after each epoch.
    optimize: whether XLA is to optimize the steps.
    scan: whether a compiled call takes the steps of an epoch, or one. On a CPU
      a convolution of XLA is a hundred times as slow in a loop of XLA.
  """

  model: nn.Module
  pool: splits_lib.Pool
  arms: Mapping[str, arms_lib.Arm]
  epochs: int
  batch_size: int
  is_iid: bool = False
  make_tx: Callable[..., optax.GradientTransformation] = descent
  augment: Optional[Callable[[Any, Any, jax.Array], jax.Array]] = None
  begin: Callable[[dict[str, Any]], dict[str, Any]] = dict
  has_curve: bool = False
  optimize: bool = True
  scan: bool = True
  _compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def _pool(self) -> tuple[jax.Array, jax.Array]:
    return jnp.asarray(self.pool.x), jnp.asarray(self.pool.y)

  @property
  def _steps(self) -> int:
    return self.pool.train_size // self.batch_size

  def epochs_of(self, name: str) -> int:
    """Passes over the training rows that an arm takes."""
    return self.epochs * self.arms[name].epochs

  def __call__(
    self,
    name: str,
    splits: splits_lib.Splits,
    learning_rate: np.ndarray,
    rho: np.ndarray,
    weight_decay: np.ndarray,
    on_epoch: Callable[[], None] = lambda: None,
  ) -> Outcome:
    """Trains and tests runs of an arm: one split, rate, radius and decay each.

    ``on_epoch`` is called after each epoch.
    """
    rates = np.array([learning_rate, rho, weight_decay], np.float32)
    runs = jax.tree.map(jnp.asarray, (splits, *rates))
    splits = runs[0]
    curve: list[np.ndarray] = []
    state, is_finite = self._first_state(name, runs), []
    step = self._epoch if self.scan else self._step
    for _ in range(self.epochs_of(name)):
      orders = self._call(self._orders, None, state.step, splits)
      for i in [slice(None)] if self.scan else range(self._steps):
        positions = jax.tree.map(lambda x, i=i: x[:, i], orders)
        state, losses_finite = self._call(
          step, name, state, runs, positions, donate=1
        )
        is_finite.append(losses_finite)
      if self.has_curve:
        curve.append(self._accuracy(state, splits, splits.validation_rows))
      # So that the bar moves when an epoch is done, not when it is enqueued.
      jax.block_until_ready(state)
      on_epoch()
    runs_of = lambda x: np.asarray(x).reshape(len(splits.seed), -1)
    is_finite += [
      np.all(np.isfinite(runs_of(x)), axis=1)
      for x in jax.tree.leaves(state.params)
    ]
    accuracy = functools.partial(self._accuracy, state, splits)
    return Outcome(
      test_accuracy=accuracy(splits.test_rows),
      validation_accuracy=accuracy(splits.validation_rows),
      curve=np.array(curve).T,
      diverged=~np.all(is_finite, axis=0),
      params=state.params,
      perturbation_state=state.perturbation_state,
    )

  def loss(self, params: Any, batch: Any) -> jax.Array:
    """Cross-entropy of a batch of ``"x"`` and ``"y"``, mean over its rows."""
    return self._loss(params, {}, batch, None)[0]

  def training_data(
    self, splits: splits_lib.Splits, run: int
  ) -> dict[str, Any]:
    """The training rows of one run as one batch, its noisy labels included."""
    pool = self.pool.x, self.pool.y
    return _rows(pool, jax.tree.map(lambda x: x[run], splits), slice(None))

  def _epoch(self, name, pool, state, run, orders):
    """The steps of an epoch, and whether all their losses are finite."""
    state, is_finite = jax.lax.scan(
      lambda state, positions: self._step(name, pool, state, run, positions),
      state,
      orders,
    )
    return state, jnp.all(is_finite)

  def _orders(self, name, pool, step, splits):
    """The rows of each batch by seed and step alone, and those of another."""
    del name, pool
    _, key = jax.random.split(jax.random.key(splits.seed))
    key, rows = jax.random.fold_in(key, step), len(splits.train_rows)
    shape = (self._steps, self.batch_size)
    if self.is_iid:
      order = jax.random.randint(key, shape, 0, rows)
    else:
      order = jax.random.permutation(key, rows)
      order = order[: self._steps * self.batch_size].reshape(shape)
    return order, jnp.roll(order, 1, axis=0)

  def _first_state(self, name, runs):
    # Random numbers take longer to optimize than they run.
    call = functools.partial(self._call, is_hot=False)
    variables = call(self._variables, None, runs[0].seed)
    return call(self._init, name, self.begin(variables), runs)

  def _variables(self, name, pool, seed):
    del name  # Of the seed alone, so that the arms share them.
    key, _ = jax.random.split(jax.random.key(seed))
    return dict(self.model.init(key, pool[0][:1].astype(jnp.float32)))

  def _init(self, name, pool, variables, run):
    del pool
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=variables.pop("params"),
      model_state=variables,
      **self._transforms(name, run),
    )
    return state.replace(tx=None, perturbation=None)

  def _transforms(self, name, run) -> dict[str, Any]:
    # They close over traced rates, and so must not leave the program.
    _, learning_rate, rho, weight_decay = run
    ascent = self.arms[name].perturbation
    return {
      "tx": self.make_tx(learning_rate, weight_decay, self._steps_of(name)),
      "perturbation": None if ascent is None else ascent(rho),
    }

  def _steps_of(self, name) -> int:
    return self.epochs_of(name) * self._steps

  def _step(self, name, pool, state, run, positions):
    """A step on the rows at these positions, and whether its loss is finite."""
    own, other = positions
    arm, rows_at = self.arms[name], functools.partial(_rows, pool, run[0])
    batch: dict[str, Any] = rows_at(own)
    if self.augment is not None:
      batch["x"] = self.augment(run[0].seed, state.step, batch["x"])
    if arm.sees_more:
      batch |= {
        "whole": rows_at(jnp.arange(run[0].train_rows.shape[0])),
        "other": rows_at(other),
      }
    step = arm.step(self._loss, self._steps_of(name))
    state = state.replace(**self._transforms(name, run))
    state, metrics = step(state, batch)
    state = state.replace(tx=None, perturbation=None)
    return state, jnp.isfinite(metrics["loss"])

  def _loss(self, params, model_state, batch, rng):
    del rng
    logits, model_state = self.model.apply(
      {"params": params, **model_state},
      batch["x"],
      train=True,
      mutable=list(model_state),
    )
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
      logits, batch["y"]
    )
    loss = jnp.mean(losses, where=batch.get("where"))
    return loss, (dict(model_state), {})

  def _accuracy(self, state, splits, rows) -> np.ndarray:
    """Percent of the rows classified as labeled, shape `[R]`, float64."""
    variables = {"params": state.params, **state.model_state}
    number, hits = rows.shape[1], np.zeros(len(rows))
    for i in range(0, number, _ROWS_AT_ONCE):
      some = rows[:, i : i + _ROWS_AT_ONCE]
      hits += np.asarray(self._call(self._hits, None, variables, splits, some))
    return 100 * hits / number

  def _hits(self, name, pool, variables, splits, rows):
    del name
    logits: Any = self.model.apply(variables, _inputs(pool, splits, rows))
    return jnp.sum(jnp.argmax(logits, axis=-1) == pool[1][rows])

  def _call(self, fn, name, *args, is_hot=True, donate=()) -> Any:
    """Calls `fn(name, pool, *args)`, compiled, vmapped over runs in `args`."""
    key = (fn.__name__, name)
    if key not in self._compiled:
      self._compiled[key] = jax.jit(
        lambda pool, *args: jax.vmap(functools.partial(fn, name, pool))(*args),
        donate_argnums=donate,
        compiler_options=None if is_hot and self.optimize else _UNOPTIMIZED,
      )
    return self._compiled[key](self._pool, *args)


def _rows(pool, splits, positions) -> dict[str, Any]:
  return {
    "x": _inputs(pool, splits, splits.train_rows[positions]),
    "y": splits.train_labels[positions],
  }


def _inputs(pool, splits, rows) -> jax.Array:
  return (pool[0][rows] - splits.mean) / splits.standard_deviation

"""The two-pass train step of a Flax loop."""

import functools
import re
from typing import Any, Callable, Collection, Unpack

import jax
from jax import core
from jax import numpy as jnp

from fsam_optax._axes import mean
from fsam_optax._fsam import check_bound
from fsam_optax._gradients import divided
from fsam_optax._gradients import times
from fsam_optax._loss import NO_MODEL_STATE
from fsam_optax._loss import check_averaged
from fsam_optax._loss import check_loss_fn
from fsam_optax._loss import step_output
from fsam_optax._options import Options
from fsam_optax._options import PassOptions
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbed_weights import with_averages
from fsam_optax._train_state import TrainState
from fsam_optax._trees import PyTree
from fsam_optax._trees import leaves_by_path
from fsam_optax._two_passes import two_passes


def make_train_step(
  loss_fn: Callable[..., Any],
  *,
  metrics: Collection[str] = (),
  extra_args: Collection[str] = (),
  jit: bool = True,
  skip_nonfinite: bool = True,
  **options: Unpack[PassOptions],
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
  """Builds the two-pass train step of a Flax loop.

  The first pass, at the parameters, gives the loss, the new model state, the
  metrics and the perturbation. The second pass, at the perturbed parameters and
  with the same dropout key, gives the gradient for the optimizer.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp, optax
    >>> def loss_fn(params, model_state, batch, rng):
    ...   del rng  # For dropout: folded from `state.rng` and `state.step`.
    ...   loss = jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)
    ...   return loss, (model_state, {})
    >>> state = fsam_optax.TrainState.create(
    ...   apply_fn=None,
    ...   params={"w": jnp.zeros(2)},
    ...   tx=optax.sgd(0.1),
    ...   perturbation=fsam_optax.friendly_perturbation(rho=0.05),
    ... )
    >>> step = fsam_optax.make_train_step(loss_fn)
    >>> batch = {"x": jnp.eye(2), "y": jnp.ones(2)}
    >>> state, metrics = step(state, batch)
    >>> print(f"{metrics['loss']:.2f}", sorted(metrics))
    1.00 ['loss', 'perturbation_norm', 'perturbed_loss', 'sharpness', 'skipped']

  Args:
    loss_fn: ``loss_fn(params, model_state, batch, rng)`` returns ``(loss,
      (model_state, metrics))``: a real scalar, the updated model state in the
      structure, shapes and dtypes of the one given, and a dict of metrics.
    metrics: the fields of :class:`SharpnessInfo` to report besides, out of
      ``"gradient_norm"``, ``"direction_norm"`` and ``"gradient_ema_cosine"``.
      A field that is not named costs nothing.
    extra_args: names of the loss's metrics that the optimizer's update gets as
      arguments. It always gets ``value``, the loss, which
      :func:`optax.contrib.reduce_on_plateau` reads.
    skip_nonfinite: whether a step whose loss in either pass, direction of the
      ascent or second gradient is not finite leaves parameters, optimizer
      state, model state and ``step`` bit for bit as they were. The average
      keeps a first gradient that was finite: to undo that would cost a copy of
      the average. The check is one pass over the second gradient.
    jit: whether to compile the step and donate the state to it. The arrays of
      that state, which may be the parameters that it was created from, cannot
      be used afterwards. With a gate (``every``, ``start`` or ``stop``) the
      host then picks one of two compiled steps. It reads ``state.step`` when it
      gets another state than it returned last, and counts calls from there; a
      skipped step is a call, too. With ``jit=False``, and inside another
      compiled function, the gate is a conditional on ``state.step``, which
      keeps the memory of both branches.
    **options: see :class:`~fsam_optax._options.PassOptions`. Every replica and
      every micro-batch gets a key of its own, folded from the step's key and
      its index. The model state is the mean over the replicas, integers in it
      must agree, and it passes from one micro-batch to the next. Model state,
      loss and metrics come from the first pass; with ``ascent_fraction`` that
      pass sees a fraction of the rows.

  Returns:
    A function ``step(state, batch)`` that returns ``(state, metrics)``, where
    ``metrics`` is a dict of ``loss``, ``perturbed_loss``, ``sharpness`` (the
    second minus the first), ``perturbation_norm``, ``skipped`` (int32, 1 where
    the step was skipped), the fields that the argument ``metrics`` names, and
    the loss's own. All but the loss's own are scalars. Where
    ``state.perturbation`` is None there is one pass, and the sharpness is 0.

  Raises:
    TypeError: if an argument is of a wrong type, or an option is unknown; at
      call, if ``state`` is not a :class:`TrainState`, or ``loss_fn`` does not
      return a loss, a model state and metrics.
    ValueError: if ``metrics`` names an unknown field; at call, if the model
      state changes its structure, a shape or a dtype, a metric of the loss has
      a name that the step uses, one in ``extra_args`` is missing, the state was
      donated to an earlier step, or ``skip_nonfinite`` is False with a
      ``dynamic_scale``; and what :func:`value_and_grad` raises at call.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024

  .. note::
    Several networks, such as those of a GAN, take a state and a step each. Put
    the other network's parameters into the batch. A loss that closes over them
    would keep the values at which it was compiled.

  .. note::
    With ``state.dynamic_scale``, both passes differentiate the scaled loss and
    divide the gradient by the scale at once, in float32. If the direction or
    the second gradient overflows, the step is skipped and the scale lowered, by
    Flax's rule.
  """
  check_loss_fn(loss_fn, ("params", "model_state", "batch", "rng"))
  unknown = set(metrics) - _OPTIONAL_METRICS
  if isinstance(metrics, str) or unknown:
    raise ValueError(
      f"`metrics` must be a collection of names out of "
      f"{sorted(_OPTIONAL_METRICS)}, got {metrics!r}."
    )
  if isinstance(extra_args, str):
    raise TypeError(
      "`extra_args` must be a collection of names of metrics, got "
      f"{extra_args!r}. Write `extra_args=({extra_args!r},)`."
    )
  chosen = Options.from_keywords(options)

  def step_with(options):
    def step(state: TrainState, batch: PyTree):
      return _step(
        loss_fn, metrics, extra_args, skip_nonfinite, options, state, batch
      )

    step.axes = options.axes  # Read by `sharding.shard_map_step`.
    return step

  if not jit:
    return step_with(chosen)
  if chosen.is_gated:
    return _HostGatedStep(step_with, chosen)
  return _CompiledStep(step_with(chosen))


class _CompiledStep:
  """A compiled step that donates the state, and raises for a donated one.

  It has the methods of a function of :func:`jax.jit`, such as ``lower``.
  """

  def __init__(self, step):
    self._compiled = jax.jit(step, donate_argnums=0)
    functools.update_wrapper(self, step)

  def __getattr__(self, name):
    # An error for an attribute that is not there yet, as while it is copied.
    return getattr(object.__getattribute__(self, "_compiled"), name)

  def __call__(self, state, batch):
    number = getattr(state, "step", None)
    is_concrete = not isinstance(number, core.Tracer)
    if is_concrete and isinstance(number, jax.Array) and number.is_deleted():
      # JAX ends the process for a deleted array of several CPU devices.
      _check_not_donated(state, batch)
    try:
      return self._compiled(state, batch)
    except (RuntimeError, ValueError):
      _check_not_donated(state, batch)
      raise


class _HostGatedStep:
  """Picks on the host between two compiled steps, of which one ascends.

  A conditional in one compiled step keeps the memory of both branches, and on
  the CPU its matrix products run slowly. Two compiled steps cost neither.
  """

  def __init__(self, step_with, options):
    self._options, self.axes = options, options.axes
    self._traced = step_with(options)
    self._compiled = {
      ascends: _CompiledStep(step_with(options.always(ascends)))
      for ascends in (True, False)
    }
    self._count = 0
    self._step_array = None

  def __call__(self, state, batch):
    _check_state(state)
    if isinstance(state.step, core.Tracer):
      return self._traced(state, batch)
    if state.step is not self._step_array:
      # The last call did not return this state: it is new, restored or another
      # run's. Here alone the host waits for the device.
      _check_not_donated(state, None)
      self._count = int(state.step)
    compiled = self._compiled[self._options.gate(self._count)]
    state, metrics = compiled(state, batch)
    self._count += 1
    self._step_array = state.step
    return state, metrics

  def lower(self, state, batch):
    """Lowers one program with both branches, as :func:`jax.jit` does.

    That program is right at every step. Each of the two programs that the calls
    run is right at its own steps alone.
    """
    return jax.jit(self._traced, donate_argnums=0).lower(state, batch)


def _step(loss_fn, names, extra_args, skip_nonfinite, options, state, batch):
  """One step: the two passes, the update if both are finite, the metrics."""
  _check_state(state)
  check_bound(options.axes)
  if state.dynamic_scale is not None and not skip_nonfinite:
    raise ValueError(
      "`skip_nonfinite` must be True when the state has a `dynamic_scale`, "
      "got False: a step that overflows must be skipped."
    )
  scale = state.dynamic_scale
  outcome = two_passes(
    state.perturbation,
    options,
    _loss_of_part(loss_fn, state, options),
    state.params,
    state.perturbation_state,
    batch,
    state.model_state,
    step=state.step,
    loss_scale=None if scale is None else scale.scale,
    optimizer_state=state.opt_state,
    optimizer_steps=state.step,
  )
  outcome = outcome._replace(aux=_mean_metrics(outcome, options))
  new_state, is_finite = _updated(
    state, outcome, extra_args, options, skip_nonfinite
  )
  info = outcome.info
  reported = {
    "loss": outcome.loss,
    "perturbed_loss": info.perturbed_value,
    "sharpness": info.perturbed_value - outcome.loss,
    "perturbation_norm": info.perturbation_norm,
    "skipped": 1 - jnp.asarray(is_finite, jnp.int32),
    **{name: getattr(info, name) for name in names},
  }
  if taken := sorted(reported.keys() & outcome.aux.keys()):
    raise ValueError(
      f"`loss_fn` must not report metrics under the names {taken}, which the "
      "step uses. Rename them."
    )
  return new_state, {**reported, **outcome.aux}


def _loss_of_part(loss_fn, state, options):
  """The loss as the engine calls it, with a key for each part and replica."""
  rng = state.rng
  if rng is not None:
    rng = jax.random.fold_in(rng, state.step)
    if options.axes:
      rng = jax.random.fold_in(rng, jax.lax.axis_index(options.axes))

  def loss_of_part(params, part, index, model_state):
    key = rng
    if rng is not None and options.num_microbatches > 1:
      key = jax.random.fold_in(rng, index)
    try:
      output = loss_fn(params, model_state, part, key)
    except Exception as error:
      # The errors of Python and Flax for a missing collection of variables.
      if model_state is None and re.search("NoneType|collection", str(error)):
        error.add_note(NO_MODEL_STATE)
      # The errors of JAX, Flax and Equinox for a missing key.
      if key is None and re.search("PRNG|rngs|requires a key", str(error)):
        error.add_note(
          "`rng` of the train state is None. A loss that draws, as dropout "
          "does, needs it: `TrainState.create(..., rng=jax.random.key(0))`."
        )
      raise
    return step_output(output, model_state)

  return loss_of_part


def _check_state(state):
  """Raises unless the state is a :class:`TrainState`."""
  if not isinstance(state, TrainState):
    raise TypeError(
      "`state` must be a fsam_optax.TrainState, got "
      f"{type(state).__module__}.{type(state).__name__}. Begin with "
      "`fsam_optax.TrainState.create`; its `replace` takes over the step and "
      "the optimizer's state of Flax's own."
    )


def _check_not_donated(state, batch):
  """Raises where an array is deleted, or occurs twice in state and batch."""
  in_state = set()
  for path, x in leaves_by_path({"batch": batch, "state": state})[::-1]:
    if not isinstance(x, jax.Array) or isinstance(x, core.Tracer):
      continue
    if x.is_deleted():
      problem = "one that an earlier step took"
    elif id(x) in in_state:
      problem = "one of the state"
    else:
      if path.startswith("['state']"):
        in_state.add(id(x))
      continue
    raise ValueError(
      "`state` must be the only holder of its arrays, because a compiled step "
      f"donates them, got {problem} at {path}. Go on with the state that the "
      "step returned; begin an average of the parameters, or a second state, "
      "with a copy made before, `jax.tree.map(jnp.copy, params)`; or use "
      "`jax.jit(make_train_step(..., jit=False))`, which donates nothing."
    )


def _mean_metrics(outcome, options):
  """The loss's own metrics: means over the replicas, weighted by their rows."""
  if not options.axes:
    return outcome.aux
  check_averaged(outcome.aux)
  totals = mean(
    (times(outcome.aux, outcome.weight), outcome.weight), options.axes
  )
  means = divided(*totals)
  if (name := options.weight) is not None:
    means[name] = jax.lax.psum(outcome.aux[name], options.axes)
  return means


def _updated(state, outcome, extra_args, options, skip_nonfinite):
  """The next state, and whether loss and gradients were finite."""
  # A first gradient that was finite stays in the average even if the step is
  # skipped: to undo that costs a copy of the average. The second gradient
  # enters the average where the optimizer reads it, in one pass over it.
  averages_ascent = options.ema_gradient == "ascent"
  advanced = outcome.advance() if averages_ascent else None
  before = state.replace(perturbation_state=None) if averages_ascent else state
  if unknown := sorted(set(extra_args) - outcome.aux.keys()):
    raise ValueError(
      f"`extra_args` must name metrics of the loss, {sorted(outcome.aux)}, got "
      f"{unknown}."
    )
  named = {name: outcome.aux[name] for name in extra_args}

  def update():
    return before.apply_gradients(
      grads=outcome.grads,
      extra_args={"value": outcome.loss, **named},
      model_state=outcome.carry,
      perturbation_state=(
        None if averages_ascent else outcome.advance(skip_nonfinite or None)
      ),
    )

  if skip_nonfinite:
    is_finite = (
      jnp.isfinite(outcome.loss)
      & jnp.isfinite(outcome.info.perturbed_value)
      & jnp.isfinite(outcome.info.direction_norm)
      & jnp.isfinite(global_norm(outcome.grads))
    )
    after = _where_finite(is_finite, update, before, not averages_ascent)
  else:
    is_finite, after = True, update()
  if (scale := state.dynamic_scale) is not None:
    after = after.replace(dynamic_scale=_next_loss_scale(scale, is_finite))
  if averages_ascent:
    # A schedule of rho counts the steps taken, as those of the optimizer do.
    after = after.replace(
      perturbation_state=with_averages(
        is_finite, advanced, state.perturbation_state
      )
    )
  return after, is_finite


_OPTIONAL_METRICS = frozenset(
  {"gradient_norm", "direction_norm", "gradient_ema_cosine"}
)


def _where_finite(is_finite, update, before, has_average):
  """The state of `update()` if `is_finite`, else the state `before`.

  On a GPU the results of a conditional are buffers of their own, two copies of
  the model, and a select is a part of the writing. On a CPU a select keeps the
  old arrays beside the new ones, and a conditional does not. On a TPU the
  conditional moves fewer bytes, except with the average in the update: a select
  lets each leaf of it be written as soon as the gradient of that leaf is there.
  """
  if not isinstance(is_finite, core.Tracer):
    return update() if is_finite else before
  conditional = lambda: jax.lax.cond(is_finite, update, lambda: before)
  select = lambda: jax.tree.map(
    lambda new, old: jnp.where(is_finite, new, old), update(), before
  )
  return jax.lax.platform_dependent(
    cpu=conditional, tpu=select if has_average else conditional, default=select
  )


def _next_loss_scale(scale, is_finite):
  """The next scale, by Flax's rule, which wants a gradient: 1 or infinity."""
  outcome = jnp.where(is_finite, 1.0, jnp.inf)
  return scale.value_and_grad(lambda x: x * outcome)(1.0).dynamic_scale

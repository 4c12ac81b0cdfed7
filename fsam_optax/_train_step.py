"""The Flax face: a train state and the two-pass train step."""

from typing import Any, Callable, Collection, Optional

from flax import struct
from flax.training import dynamic_scale as dynamic_scale_lib
from flax.training import train_state
import jax
from jax import core
from jax import numpy as jnp
import optax

from fsam_optax._axes import check_bound
from fsam_optax._axes import replica_index
from fsam_optax._loss import check_loss_fn
from fsam_optax._options import Options
from fsam_optax._perturbation import global_norm
from fsam_optax._two_passes import one_pass
from fsam_optax._two_passes import two_passes
from fsam_optax._two_passes import with_radius_states


class TrainState(train_state.TrainState):
  """Flax's train state with what the two passes need besides.

  Attributes:
    perturbation: transformation from gradients to perturbations (static);
      None trains with the base optimizer alone, one gradient a step.
    perturbation_state: its state.
    model_state: variables of the model that no gradient updates, such as
      BatchNorm's statistics; any pytree or None.
    rng: key from which the dropout key of each step is folded, or None.
    dynamic_scale: Flax's loss scale, for float16, or None.
  """

  perturbation: Optional[optax.GradientTransformation] = struct.field(
    pytree_node=False, default=None
  )
  perturbation_state: Any = None
  model_state: Any = None
  rng: Optional[jax.Array] = None
  dynamic_scale: Optional[dynamic_scale_lib.DynamicScale] = None

  @classmethod
  def create(
    cls,
    *,
    apply_fn,
    params,
    tx,
    perturbation,
    model_state=None,
    rng=None,
    dynamic_scale=None,
    **kwargs,
  ):
    """Creates a state at step 0 with fresh optimizer and perturbation states.

    Args:
      apply_fn: usually ``model.apply``, kept for convenience.
      params: the parameters, a dict or another container of arrays.
      tx: the base optimizer. Not a chain with :func:`fsam` in it: here the
        train step takes the second gradient.
      perturbation: such as :func:`friendly_perturbation`; None for the base
        optimizer alone.
      model_state: see :class:`TrainState`.
      rng: see :class:`TrainState`.
      dynamic_scale: a :class:`flax.training.dynamic_scale.DynamicScale`, see
        :func:`make_train_step`.
      **kwargs: fields that a subclass adds.

    Returns:
      The state, with ``step`` an int32 array of shape ``[]``.
    """
    state = super().create(
      apply_fn=apply_fn,
      params=params,
      tx=tx,
      perturbation=perturbation,
      perturbation_state=(
        None if perturbation is None else perturbation.init(params)
      ),
      model_state=model_state,
      # A copy: the train step donates the state, and the key is the caller's.
      rng=None if rng is None else jnp.copy(rng),
      dynamic_scale=_as_arrays(dynamic_scale),
      **kwargs,
    )
    return state.replace(step=jnp.zeros([], jnp.int32))

  @classmethod
  def from_flax(
    cls,
    state: train_state.TrainState,
    *,
    perturbation,
    model_state=None,
    rng=None,
    dynamic_scale=None,
    **kwargs,
  ):
    """Turns flax's own train state into this one, in the middle of training.

    The step, the parameters, the optimizer and its state go on; only the
    perturbation starts afresh. A checkpoint of flax's state is restored into
    flax's state first: ``TrainState.from_flax(manager.restore(step,
    args=StandardRestore(flax_state)), perturbation=...)``.

    Examples:
      >>> import fsam_optax, jax.numpy as jnp, optax
      >>> from flax.training import train_state
      >>> flax_state = train_state.TrainState.create(
      ...   apply_fn=None, params={"w": jnp.zeros(2)}, tx=optax.adamw(1e-3)
      ... )
      >>> state = fsam_optax.TrainState.from_flax(
      ...   flax_state, perturbation=fsam_optax.friendly_perturbation(rho=0.05)
      ... )

    Args:
      state: a train state of flax or a subclass. Its arrays become the new
        state's, so a step that donates that state takes them too.
      perturbation: as in :meth:`create`.
      model_state: as in :meth:`create`. A subclass of flax's state keeps such
        variables in a field of its own, which is not searched for: hand it
        over, as in ``model_state={"batch_stats": state.batch_stats}``.
      rng: as in :meth:`create`.
      dynamic_scale: as in :meth:`create`, and handed over like
        ``model_state``.
      **kwargs: fields that a subclass adds.

    Returns:
      The state, with ``step`` an int32 array of shape ``[]``.

    Raises:
      TypeError: if ``state`` is not flax's, or is this class's already.
    """
    if not isinstance(state, train_state.TrainState):
      raise TypeError(
        "`state` must be a flax.training.train_state.TrainState, got "
        f"{type(state).__name__}. Start from `create` instead."
      )
    if isinstance(state, TrainState):
      raise TypeError(
        "`state` must be flax's own train state, got one with a perturbation "
        "already. Change it by `state.replace(perturbation=perturbation, "
        "perturbation_state=perturbation.init(state.params))`."
      )
    created = cls.create(
      apply_fn=state.apply_fn,
      params=state.params,
      # Not state.tx, whose fresh state would need memory only to be dropped.
      tx=optax.identity(),
      perturbation=perturbation,
      model_state=model_state,
      rng=rng,
      dynamic_scale=dynamic_scale,
      **kwargs,
    )
    return created.replace(
      step=jnp.asarray(state.step, jnp.int32),
      tx=state.tx,
      opt_state=state.opt_state,
    )


def make_train_step(
  loss_fn: Callable[..., Any],
  *,
  metrics: Collection[str] = (),
  jit: bool = True,
  skip_nonfinite: bool = True,
  **options: Any,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
  """Builds the two-pass train step of a Flax loop.

  The first pass, at the parameters, gives the loss, the new model state, the
  metrics and the perturbation; the second, at the perturbed parameters and
  with the same dropout key, the gradient that the optimizer gets.

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
      structure, shapes and dtypes of the one given, and a dict of whatever the
      loss wants to report.
    metrics: the fields of :class:`SharpnessInfo` to report besides, out of
      ``"gradient_norm"``, ``"direction_norm"`` and ``"gradient_ema_cosine"``.
      What is not asked for costs nothing.
    skip_nonfinite: whether a step whose loss or gradient, of either pass, is
      not finite leaves parameters, optimizer state, model state and ``step``
      bit for bit as they were. The average keeps a first gradient that was
      finite: to undo that would cost a copy of the average. The check is one
      pass over the second gradient.
    jit: whether to compile the step and donate the state to it: the arrays of
      the state given, those of the parameters it was created from included,
      cannot be used afterwards. With a gate (``every``, ``start`` or ``stop``)
      there are two compiled steps, one with the second pass and one without,
      and the host picks one at each call: no step pays for the other's memory.
      It reads ``state.step`` when a state comes that is not the one returned
      last, as at a resume, and counts calls from there, so that no step waits
      for the one before; a skipped step is a call, too. Inside a program that
      is being traced, as in :func:`jax.lax.scan`, and with ``jit=False``, the
      gate is a conditional on ``state.step`` in the pure function, which keeps
      the memory of both branches.
    **options: those of :func:`value_and_grad`, to which the model state adds:

      ``axis_name``: every replica gets a key of its own, folded from the step's
      key and its index. The model state becomes the mean over the replicas;
      integers in it must agree on all of them.

      ``num_microbatches``: each micro-batch gets a key of its own, folded from
      the step's key and its index; the model state passes from one to the
      next, and the metrics are means over them.

      ``ascent_fraction``: the loss, the metrics and the model state come from
      the first pass still, so from that fraction of the rows: BatchNorm's
      statistics of the parameters that are trained, not of perturbed ones.

      ``every``, ``start``, ``stop``: the step is ``state.step``.

  Returns:
    A function ``step(state, batch)`` that returns ``(state, metrics)``, where
    ``metrics`` is a dict of ``loss``, ``perturbed_loss``, ``sharpness`` (the
    second minus the first), ``perturbation_norm``, ``skipped`` (int32, 1 where
    the step was skipped), what the argument ``metrics`` names, and the loss's
    own. All are scalars but for the loss's own. Where ``state.perturbation``
    is None there is one pass, and the sharpness is 0.

  Raises:
    TypeError: if an argument is of a wrong type, or no option; at call, if
      ``loss_fn`` does not return what it must.
    ValueError: if ``metrics`` names an unknown field; at call, if the model
      state changes its structure, a shape or a dtype, or if a metric of the
      loss has a name that the step uses.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024

  .. note::
    Several networks, such as those of a GAN or an actor and its critic, take a
    state and a step each. Hand the other network's parameters over in the
    batch, not by closing over them, which would keep those the step was
    compiled with. A step differentiates, perturbs and updates the parameters
    of its own state alone; both passes see the other network unperturbed.

  .. note::
    With ``state.dynamic_scale``, both passes take the gradient of the scaled
    loss and unscale it, in float32, before anything else sees it. If either
    pass overflows, the step is skipped and the scale lowered, by Flax's rule.
  """
  check_loss_fn(loss_fn)
  unknown = set(metrics) - _OPTIONAL_METRICS
  if isinstance(metrics, str) or unknown:
    raise ValueError(
      f"`metrics` must be a collection of names out of "
      f"{sorted(_OPTIONAL_METRICS)}, got {metrics!r}."
    )
  chosen = Options.of(options)

  def step_with(options):
    def step(state: TrainState, batch: Any):
      return _step(loss_fn, metrics, skip_nonfinite, options, state, batch)

    return step

  if not jit:
    return step_with(chosen)
  if chosen.is_gated:
    return _HostGatedStep(step_with, chosen)
  return jax.jit(step_with(chosen), donate_argnums=0)


class _HostGatedStep:
  """Picks on the host between two compiled steps, of which one ascends.

  A conditional in one compiled step keeps the memory of both branches, and on
  the CPU its matrix products run slowly. Two compiled steps cost neither.
  """

  def __init__(self, step_with, options):
    self._options = options
    self._traced = step_with(options)
    self._compiled = {
      ascends: jax.jit(step_with(options.always(ascends)), donate_argnums=0)
      for ascends in (True, False)
    }
    self._count = 0
    self._step_array = None

  def __call__(self, state, batch):
    if isinstance(state.step, core.Tracer):
      return self._traced(state, batch)
    if state.step is not self._step_array:
      # Not the state that came out of the last call: begun, restored, another
      # run's. Only here the host waits for the device.
      self._count = int(state.step)
    compiled = self._compiled[self._options.gate(self._count)]
    state, metrics = compiled(state, batch)
    self._count += 1
    self._step_array = state.step
    return state, metrics


def _step(loss_fn, names, skip_nonfinite, options, state, batch):
  """One step: the two passes, the update where they are finite, the metrics."""
  check_bound(options.axes)
  if state.dynamic_scale is not None and not skip_nonfinite:
    raise ValueError(
      "`skip_nonfinite` must be True when the state has a `dynamic_scale`, "
      "got False: a step that overflows must be skipped."
    )
  found = _passes(_loss_of_part(loss_fn, state, options), options, state, batch)
  new_state, is_finite = _updated(state, found, options, skip_nonfinite)
  info = found.info
  reported = {
    "loss": found.loss,
    "perturbed_loss": info.perturbed_value,
    "sharpness": info.perturbed_value - found.loss,
    "perturbation_norm": info.perturbation_norm,
    "skipped": 1 - jnp.asarray(is_finite, jnp.int32),
    **{name: getattr(info, name) for name in names},
  }
  if taken := sorted(reported.keys() & found.aux.keys()):
    raise ValueError(
      f"`loss_fn` must not report metrics under the names {taken}, which the "
      "step uses. Rename them."
    )
  return new_state, {**reported, **found.aux}


def _loss_of_part(loss_fn, state, options):
  """The loss as the engine calls it, with a key for each part and replica."""
  rng = state.rng
  if rng is not None:
    rng = jax.random.fold_in(rng, state.step)
    if options.axes:
      rng = jax.random.fold_in(rng, replica_index(options.axes))

  def loss_of_part(params, part, index, model_state):
    key = rng
    if rng is not None and options.num_microbatches > 1:
      key = jax.random.fold_in(rng, index)
    output = loss_fn(params, model_state, part, key)
    _check_output(output, model_state)
    return output

  return loss_of_part


def _passes(loss_of_part, options, state, batch):
  """The two passes, or one where the state has no perturbation."""
  scale = None if state.dynamic_scale is None else state.dynamic_scale.scale
  if state.perturbation is None:
    found = one_pass(
      options,
      loss_of_part,
      state.params,
      batch,
      state.model_state,
      loss_scale=scale,
    )
    return found._replace(
      advance=lambda is_finite=None: state.perturbation_state
    )
  return two_passes(
    state.perturbation,
    options,
    loss_of_part,
    state.params,
    state.perturbation_state,
    batch,
    state.model_state,
    step=state.step,
    loss_scale=scale,
  )


def _updated(state, found, options, skip_nonfinite):
  """The next state, and whether what it was made from was finite."""
  # A first gradient that was finite stays in the average even if the step is
  # skipped: to undo that costs a copy of the average. The second gradient is
  # taken in beside the optimizer, in the same pass over it.
  is_apart = options.ema_gradient == "ascent"
  advanced = found.advance() if is_apart else None
  before = state.replace(perturbation_state=None) if is_apart else state

  def update():
    return before.apply_gradients(
      grads=found.grads,
      model_state=found.carry,
      perturbation_state=(
        None if is_apart else found.advance(skip_nonfinite or None)
      ),
    )

  if skip_nonfinite:
    is_finite = (
      jnp.isfinite(found.loss)
      & jnp.isfinite(found.info.perturbed_value)
      & jnp.isfinite(found.info.direction_norm)
      & jnp.isfinite(global_norm(found.grads))
    )
    # Not jnp.where: over the donated state it makes XLA keep the old arrays
    # beside the new ones.
    after = jax.lax.cond(is_finite, update, lambda: before)
  else:
    is_finite, after = True, update()
  if (scale := state.dynamic_scale) is not None:
    after = after.replace(dynamic_scale=_advance(scale, is_finite))
  if is_apart:
    # Its schedule of rho counts the steps taken, as the optimizer's own do.
    after = after.replace(
      perturbation_state=with_radius_states(
        is_finite, advanced, state.perturbation_state
      )
    )
  return after, is_finite


_OPTIONAL_METRICS = frozenset(
  {"gradient_norm", "direction_norm", "gradient_ema_cosine"}
)


def _as_arrays(scale):
  """The loss scale with arrays for Python numbers, as later steps return it."""
  if scale is None:
    return None
  return scale.replace(
    fin_steps=jnp.asarray(scale.fin_steps, jnp.int32),
    scale=jnp.asarray(scale.scale, jnp.float32),
  )


def _advance(scale, is_finite):
  """Flax's rule for the next scale, run on a loss that is finite or not."""
  outcome = jnp.where(is_finite, 1.0, jnp.inf)
  return scale.value_and_grad(lambda x: x * outcome)(1.0).dynamic_scale


def _check_output(output, model_state):
  """Raises unless `loss_fn` returned `(loss, (model_state, metrics))`."""
  is_pair = lambda x: isinstance(x, tuple) and len(x) == 2
  if not (
    is_pair(output) and is_pair(output[1]) and isinstance(output[1][1], dict)
  ):
    raise TypeError(
      "`loss_fn` must return (loss, (model_state, metrics)) with a dict of "
      "metrics, which may be empty. Return the `model_state` it was given "
      "where the model has none."
    )
  describe = lambda tree: jax.tree.map(
    lambda x: (jnp.shape(x), jnp.result_type(x)), tree
  )
  given, returned = describe(model_state), describe(output[1][0])
  if returned != given:
    raise ValueError(
      "`loss_fn` must return the model state in the structure, shapes and "
      f"dtypes of the one it was given, {given}, got {returned}."
    )

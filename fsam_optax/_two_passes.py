"""The engine of both passes, over parts of the batch and named axes."""

from typing import Any, Callable, Literal, NamedTuple, Optional, Union

import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

from fsam_optax._axes import AxisName
from fsam_optax._axes import axes_of
from fsam_optax._axes import check_bound
from fsam_optax._axes import mean
from fsam_optax._axes import varying
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen
from fsam_optax._rows import check_batch
from fsam_optax._rows import mean_over_parts
from fsam_optax._rows import name
from fsam_optax._rows import strided_share

EmaGradient = Literal["ascent", "descent"]


class SharpnessInfo(NamedTuple):
  """What the two passes saw, scalars of shape ``[]``.

  Compiled, a field that nobody reads is not computed.

  Attributes:
    perturbed_value: loss at the perturbed parameters, dtype of the loss. Minus
      the loss it is the sharpness. The loss itself where a gate skipped the
      ascent.
    gradient_norm: Euclidean norm of the gradient at the clean parameters, on
      the rows of the ascent. Where the replicas or micro-batches ascend alone
      and the moving average takes in another gradient, or there is none, their
      mean is never formed, and this is the mean of their own norms.
    direction_norm: the norm that the radius was divided by; of the gradient
      minus the average for F-SAM, of its product with the absolute weights
      where the perturbation is adaptive. Not finite where the gradient was not.
      The mean over replicas and micro-batches where each has its own.
    perturbation_norm: Euclidean norm of the perturbation; the mean over
      replicas and micro-batches where each has its own, 0 where a gate skipped
      the ascent.
    gradient_ema_cosine: cosine between the gradient of ``gradient_norm`` and
      the moving average that is subtracted from it; 0 where there is none or
      one of them is zero.
  """

  perturbed_value: jax.Array
  gradient_norm: jax.Array
  direction_norm: jax.Array
  perturbation_norm: jax.Array
  gradient_ema_cosine: jax.Array


def two_passes(
  perturbation: optax.GradientTransformation,
  *,
  axis_name: Optional[AxisName] = None,
  sync_perturbation: Union[bool, AxisName] = True,
  ema_gradient: EmaGradient = "ascent",
  num_microbatches: int = 1,
  ascent_fraction: float = 1.0,
  every: int = 1,
  start: int = 0,
  stop: Optional[int] = None,
) -> Callable[..., tuple[Any, ...]]:
  """The two passes over a loss that carries state from part to part.

  Args:
    perturbation: see :func:`value_and_grad`, as are the other options.
    axis_name: as there.
    sync_perturbation: as there.
    ema_gradient: as there.
    num_microbatches: as there.
    ascent_fraction: as there.
    every: as there.
    start: as there.
    stop: as there.

  Returns:
    A function ``passes(loss_fn, params, perturbation_state, batch, carry=None,
    *, step=None, loss_scale=None)`` that returns ``(loss, carry, aux, grads,
    perturbation_state, info)``. ``loss_fn(params, part, index, carry)`` returns
    ``(loss, (carry, aux))`` for the part of the batch at ``index``; the carry
    returned is that of the first pass. The gradients are those of the loss
    times ``loss_scale``, divided by it again in float32 at least.
  """
  check_perturbation(perturbation)
  axes = axes_of("axis_name", axis_name)
  ascent_axes = _ascent_axes(sync_perturbation, axes)
  _check_options(ema_gradient, ascent_fraction, num_microbatches)
  _check_gates(every, start, stop)
  is_gated = every > 1 or start > 0 or stop is not None
  is_shut = stop is not None and stop <= start
  # Whether every part of the batch ascends by itself.
  is_split = num_microbatches > 1 and sync_perturbation is False
  # Whether some replicas or parts ascend along other gradients than others.
  is_local = is_split or ascent_axes != axes

  def passes(
    loss_fn,
    params,
    perturbation_state,
    batch,
    carry=None,
    *,
    step=None,
    loss_scale=None,
  ):
    _check_params(params)
    check_bound(axes)
    check_batch(batch, num_microbatches, ascent_fraction)
    _check_state(perturbation, perturbation_state, params)
    is_active = None
    if is_shut:
      is_active = False
    elif is_gated:
      is_active = _is_active(step, every, start, stop)
    own = lambda tree: varying(tree, axes)
    mean_over_axes = lambda tree: mean(tree, axes)
    own_params = own(params)
    ema_state = find(SubtractGradientEmaState, perturbation_state)
    # Whether the mean of the first gradients is wanted for more than the
    # ascent: it costs an all-reduce, or a tree to sum the parts in.
    keeps_first_gradient = not is_local or (
      ema_gradient == "ascent" and not _is_memoryless(perturbation_state)
    )

    def value_grad(params, part, index, carry):
      def scaled(params):
        loss, (new_carry, aux) = loss_fn(params, part, index, carry)
        check_loss(loss)
        if axes or num_microbatches > 1:
          _check_aux(aux)
        scaled = loss if loss_scale is None else loss * loss_scale
        return scaled, (loss, new_carry, aux)

      grads, (loss, new_carry, aux) = jax.grad(scaled, has_aux=True)(params)
      if loss_scale is not None:
        scale = loss_scale
        grads = jax.tree.map(lambda g: widen(g) / scale, grads)
      return (loss, aux, grads), new_carry

    def first_pass(part, index, carry):
      """At the clean parameters, on the ascent's rows or, gated, on all."""
      on = lambda rows: value_grad(own_params, rows, index, carry)
      whole = lambda: on(part)
      share = lambda: on(strided_share(part, ascent_fraction))
      with jax.named_scope("ascent"):
        if is_shut or ascent_fraction == 1:
          return whole()
        if is_active is None:
          return share()
        _check_same_shapes(share, whole)
        return jax.lax.cond(
          is_active, lambda: own(share()), lambda: own(whole())
        )

    def second_pass(perturbed, part, index, carry):
      with jax.named_scope("descent"):
        (loss, _, grads), carry = value_grad(perturbed, part, index, carry)
      return (loss, grads), carry

    def perturb(gradient):
      # For complex parameters JAX's gradient is the conjugate of the ascent.
      epsilon, state = perturbation.update(
        jax.tree.map(jnp.conj, gradient), perturbation_state, params
      )
      norms = _norms(state)
      if not norms:  # Not one of ours: measure.
        norms = [(global_norm(gradient), global_norm(epsilon))]
      return epsilon, state, norms

    def measures(gradient):
      """The scalars of the first gradient that no state holds."""
      norm = global_norm(gradient)
      if ema_state is None:
        return norm, jnp.zeros_like(norm)
      return norm, _cosine(ema_state.ema, gradient)

    def at_perturbed(epsilon, ascend, otherwise):
      """What `ascend(perturbed)` returns, or `otherwise()` if gated."""
      if is_shut:
        return otherwise()
      # Outside the branch, or it would hold the perturbation besides.
      perturbed = own(optax.apply_updates(params, epsilon))
      if is_active is None:
        return ascend(perturbed)
      return jax.lax.cond(is_active, lambda: ascend(perturbed), otherwise)

    over_parts = lambda fn, carry: mean_over_parts(
      fn, batch, num_microbatches, carry, own
    )
    if is_split:

      def both_passes(part, index, carry):
        (loss, aux, gradient), new_carry = first_pass(part, index, carry)
        epsilon, _, norms = perturb(gradient)
        descent = at_perturbed(
          epsilon,
          lambda perturbed: own(second_pass(perturbed, part, index, carry)[0]),
          lambda: own((loss, gradient)),
        )
        scalars = norms, measures(gradient)
        kept = gradient if keeps_first_gradient else None
        return (loss, aux, descent, scalars, kept), new_carry

      outputs, new_carry = over_parts(both_passes, carry)
      loss, aux, descent, scalars, gradient = outputs
      perturbed_loss, grads = mean_over_axes(descent)
      gradient = mean_over_axes(gradient)
      norms, measured = mean_over_axes(scalars)
      new_state = perturbation_state
    else:
      (loss, aux, gradient), new_carry = over_parts(first_pass, carry)
      gradient = mean(gradient, ascent_axes)
      epsilon, new_state, norms = perturb(gradient)
      measured = measures(gradient)
      # What is averaged over the ascent's axes is left to average over these.
      rest = tuple(axis for axis in axes if axis not in ascent_axes)
      norms, measured = mean((norms, measured), rest)
      if keeps_first_gradient:
        gradient = mean(gradient, rest)

      def ascend(perturbed):
        fn = lambda *part: second_pass(perturbed, *part)
        return mean_over_axes(over_parts(fn, carry)[0])

      def otherwise():
        grads = gradient if keeps_first_gradient else mean(gradient, rest)
        return mean_over_axes(loss), grads

      perturbed_loss, grads = at_perturbed(epsilon, ascend, otherwise)
    loss, aux, new_carry = mean_over_axes((loss, aux, new_carry))

    if ema_gradient == "descent":
      new_state = perturb(grads)[1]
    elif is_local:
      # With nothing to remember, any gradient serves to count the update.
      new_state = perturb(gradient if keeps_first_gradient else grads)[1]
    new_state = _with_norms(new_state, norms)
    if keeps_first_gradient:
      measured = measures(gradient)
    gradient_norm, gradient_ema_cosine = measured
    direction_norm, perturbation_norm = norms[0]
    if is_active is not None:
      perturbation_norm = jnp.where(is_active, perturbation_norm, 0.0)
    info = SharpnessInfo(
      perturbed_value=perturbed_loss,
      gradient_norm=gradient_norm,
      direction_norm=direction_norm,
      perturbation_norm=perturbation_norm,
      gradient_ema_cosine=gradient_ema_cosine,
    )
    return loss, new_carry, aux, grads, new_state, info

  return passes


def _is_active(step, every, start, stop):
  """Whether the gates let this step ascend, a bool of shape []."""
  if step is None:
    raise ValueError(
      "`perturbation` must count its updates for `every`, `start` and `stop` "
      "to know the step. Build it with `scale_to_radius`."
    )
  is_active = (step >= start) & ((step - start) % every == 0)
  return is_active if stop is None else is_active & (step < stop)


def _is_radius_state(x):
  return isinstance(x, ScaleToRadiusState)


def _norms(state):
  """Direction and perturbation norms of every `scale_to_radius` inside."""
  leaves = jax.tree.leaves(state, is_leaf=_is_radius_state)
  return [
    (x.direction_norm, x.perturbation_norm)
    for x in filter(_is_radius_state, leaves)
  ]


def _with_norms(state, norms):
  """The state with these norms: of the ascent, not of the EMA's update."""
  left = iter(norms)

  def replace(x):
    if not _is_radius_state(x):
      return x
    direction_norm, perturbation_norm = next(left)
    return x._replace(
      direction_norm=direction_norm, perturbation_norm=perturbation_norm
    )

  return jax.tree.map(replace, state, is_leaf=_is_radius_state)


def _is_memoryless(state):
  """Whether the state is the same whatever gradients it was updated with."""
  leaves = jax.tree.leaves(state, is_leaf=_is_radius_state)
  return all(map(_is_radius_state, leaves))


def find(state_type, state):
  """The first state of this type inside a nested optimizer state."""
  is_found = lambda x: isinstance(x, state_type)
  leaves = jax.tree.leaves(state, is_leaf=is_found)
  return next(filter(is_found, leaves), None)


def _cosine(ema, gradient):
  """Cosine over the leaves that `ema` holds; 0 if either side is zero."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  gradient = jax.tree.map(
    lambda m, g: m if is_masked(m) else g, ema, gradient, is_leaf=is_masked
  )
  inner = optax.tree.sum(
    jax.tree.map(
      # The average is that of the conjugate gradients.
      lambda m, g: jnp.sum(jnp.real(widen(m) * widen(g))),
      ema,
      gradient,
    )
  )
  norms = global_norm(ema) * global_norm(gradient)
  return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), 0.0)


def check_loss(loss):
  if hasattr(loss, "dtype") or isinstance(loss, (int, float, complex)):
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if not shape and jnp.issubdtype(dtype, jnp.floating):
      return
    got = f"{dtype}{list(shape)}"
  else:
    got = type(loss).__name__
  raise TypeError(
    f"`loss_fn` must return the loss as a real scalar, got {got}. Take the "
    "mean over the batch; return other outputs as aux, with `has_aux=True`."
  )


def _check_aux(aux):
  for path, x in jax.tree_util.tree_leaves_with_path(aux):
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        "`loss_fn` must return floating auxiliary outputs when "
        "`num_microbatches` is above 1 or `axis_name` is given, because they "
        f"are averaged, got {dtype} at {name(path)}. Cast it to float32."
      )


def _check_same_shapes(share, whole):
  """Raises unless the auxiliary outputs are the same for fewer rows."""
  outputs = [
    jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(fn)[0][1])
    for fn in (share, whole)
  ]
  if outputs[0] != outputs[1]:
    raise ValueError(
      "`loss_fn` must return auxiliary outputs whose shapes do not depend on "
      "the number of rows when `ascent_fraction` is below 1 and `every`, "
      f"`start` or `stop` is set, got {outputs[0]} and {outputs[1]}. Reduce "
      "them over the rows."
    )


def _ascent_axes(sync_perturbation, axes):
  """The axes over which the ascent gradient is averaged, in their order."""
  if isinstance(sync_perturbation, bool):
    return axes if sync_perturbation else ()
  if not axes or not isinstance(sync_perturbation, (str, tuple)):
    raise TypeError(
      "`sync_perturbation` must be a bool, or names out of `axis_name`, got "
      f"{sync_perturbation!r}."
    )
  chosen = axes_of("sync_perturbation", sync_perturbation)
  if unknown := [axis for axis in chosen if axis not in axes]:
    raise ValueError(
      f"`sync_perturbation` must name axes out of `axis_name`, {axes}, got "
      f"{unknown}. Name the axis of the mesh that a group of replicas spans."
    )
  return tuple(axis for axis in axes if axis in chosen)


def _check_options(ema_gradient, ascent_fraction, num_microbatches):
  if ema_gradient not in ("ascent", "descent"):
    raise ValueError(
      f"`ema_gradient` must be 'ascent' or 'descent', got {ema_gradient!r}. "
      "'ascent' is the gradient at the clean parameters, as in the paper."
    )
  if isinstance(ascent_fraction, bool) or not isinstance(
    ascent_fraction, (int, float, np.number)
  ):
    raise TypeError(
      f"`ascent_fraction` must be a real number, got {ascent_fraction!r}."
    )
  if not 0 < ascent_fraction <= 1:
    raise ValueError(
      f"`ascent_fraction` must be in (0, 1], got {ascent_fraction}. For no "
      "ascent at all, use rho=0 or the base optimizer alone."
    )
  check_int("num_microbatches", num_microbatches, least=1)


def _check_gates(every, start, stop):
  check_int("every", every, least=1)
  check_int("start", start, least=0)
  if stop is not None:
    check_int("stop", stop, least=start)


def check_int(name, value, least):
  if isinstance(value, bool) or not isinstance(value, int):
    raise TypeError(f"`{name}` must be an int, got {value!r}.")
  if value < least:
    raise ValueError(f"`{name}` must be at least {least}, got {value}.")


def _check_state(perturbation, state, params):
  """Raises unless `state` is one that `perturbation` made for `params`."""
  expected = jax.eval_shape(perturbation.init, params)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  same = jax.tree.structure(state) == jax.tree.structure(expected)
  if not same or shapes(state) != shapes(expected):
    raise ValueError(
      "`perturbation_state` must be that of `perturbation.init(params)`, with "
      f"shapes {shapes(expected)}, got {shapes(state)}."
    )


def _check_params(params):
  if not (leaves := jax.tree_util.tree_leaves_with_path(params)):
    raise ValueError("`params` must hold at least one array, got none.")
  for path, x in leaves:
    dtype = getattr(x, "dtype", None) or jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"`params` must hold floating-point arrays, got {dtype} at "
        f"{name(path)}. Close over it, or keep it in the model state."
      )

"""The engine: both passes of a step, over parts of a batch and named axes.

There are two schedules. In :func:`_together` all parts of the batch ascend
along their mean gradient: all take the first pass, then all take the second. In
:func:`_part_by_part` each part ascends along its own gradient: it takes both
passes before the next part begins, without a sum of first gradients.
"""

import dataclasses
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
import optax
import optax.tree

from fsam_optax._axes import mean
from fsam_optax._fsam import difference
from fsam_optax._fsam import dtype_of
from fsam_optax._gradients import Gradients
from fsam_optax._gradients import Weighed
from fsam_optax._new_loop_checks import checked
from fsam_optax._options import Options
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbed_weights import Ascent
from fsam_optax._perturbed_weights import is_memoryless
from fsam_optax._trees import PyTree
from fsam_optax._trees import leaves_by_path


class SharpnessInfo(NamedTuple):
  """Numbers about the two passes, scalars of shape ``[]``.

  A compiled step does not compute a field that is not used.

  Attributes:
    perturbed_value: loss at the perturbed parameters, dtype of the loss. The
      sharpness is this minus the loss. Where a gate skips the ascent it is the
      loss.
    gradient_norm: Euclidean norm of the gradient at the clean parameters, on
      the rows of the ascent. With ``sync_perturbation=False`` it is the mean of
      the norms of the replicas and micro-batches, unless their mean gradient
      updates the average.
    direction_norm: the norm that divides the radius: for F-SAM of the gradient
      minus the average, times the absolute weights where the perturbation is
      adaptive. Not finite where the gradient is not. The mean over replicas and
      micro-batches where each has its own. Where groups of parameters have
      radii of their own, the root of the sum of the squares.
    perturbation_norm: Euclidean norm of the perturbation; the mean over
      replicas and micro-batches where each has its own, 0 where a gate skips
      the ascent. For parameters narrower than float32, of the perturbed
      parameters minus the parameters, which are rounded.
    gradient_ema_cosine: cosine between the gradient of ``gradient_norm`` and
      the moving average before the step; 0 without an average, or where one of
      them is zero. Of several averages it is the first one's.
  """

  perturbed_value: jax.Array
  gradient_norm: jax.Array
  direction_norm: jax.Array
  perturbation_norm: jax.Array
  gradient_ema_cosine: jax.Array


class Outcome(NamedTuple):
  """The results of the two passes of a step.

  ``advance(is_finite=None)`` returns the perturbation's state after the step.
  With ``ema_gradient="descent"`` a caller that updates the parameters in a
  branch calls it in that branch. In a branch for finite gradients alone it
  gives ``is_finite=True``, which saves the norm of the gradient.
  """

  loss: jax.Array  # Of the first pass.
  carry: PyTree  # Of the first pass over the last part of the batch.
  aux: PyTree  # Of the first pass: a mean over the parts, on this replica.
  weight: Optional[jax.Array]  # Of this replica's rows, with `weight` alone.
  grads: optax.Updates  # At the perturbed parameters, in their dtypes.
  advance: Callable[..., optax.OptState]
  info: SharpnessInfo


def two_passes(
  perturbation: Optional[optax.GradientTransformation],
  options: Options,
  loss_fn: Callable[..., Any],
  params: optax.Params,
  perturbation_state: optax.OptState,
  batch: PyTree,
  carry: PyTree = None,
  *,
  step: Optional[ArrayLike] = None,
  loss_scale: Optional[ArrayLike] = None,
  optimizer_state: Optional[optax.OptState] = None,
  optimizer_steps: Optional[ArrayLike] = None,
) -> Outcome:
  """Both passes of one step; without a perturbation, the first alone.

  ``loss_fn(params, part, index, carry)`` returns ``(loss, (carry, aux))`` for
  the part of the batch at ``index``; the carry passes from part to part. The
  gates read `step`, which is None where no state counts it. `loss_scale`
  multiplies the loss and divides the gradients, in float32 at least.
  `optimizer_state` is that of the base optimizer before its update, for a
  perturbation with ``average="optimizer"``; `optimizer_steps` is the number of
  updates in it, and None stands for the perturbation's count.
  """
  _check_params(params)
  if perturbation is None:
    options = dataclasses.replace(options, ascent_fraction=1.0)
    gradients = Gradients(loss_fn, options, batch, carry, loss_scale)
    return _one_pass(gradients, params, perturbation_state)
  check_perturbation(perturbation)
  expected = jax.eval_shape(perturbation.init, params)
  # The average may have another dtype than the parameters.
  if differing := difference(
    expected, perturbation_state, dtypes=False, containers=True
  ):
    raise ValueError(
      "`perturbation_state` must be that of `perturbation.init(params)`, with "
      f"{differing}. Begin it anew for other parameters; an NNX optimizer is "
      "for the model that it was made with."
    )
  gradients = Gradients(loss_fn, options, batch, carry, loss_scale)
  ascent = Ascent(
    perturbation,
    perturbation_state,
    params,
    options.gate(step),
    optimizer_state,
    optimizer_steps,
  )
  schedule = _part_by_part if options.is_part_by_part else _together
  outcome = schedule(gradients, ascent)
  if options.checked:
    loss, grads = checked(gradients, ascent, outcome)
    outcome = outcome._replace(loss=loss, grads=grads)
  return outcome


def _one_pass(
  gradients: Gradients, params: optax.Params, state: optax.OptState
) -> Outcome:
  """A step without a perturbation: the gradient at the clean parameters."""
  options = gradients.options
  marked = gradients.mark_varying(params)
  weighed, carry = gradients.over_parts(
    lambda *part: gradients.at(marked, *part)
  )
  aux = gradients.aux_of(weighed)
  loss, grads = _loss_and_grads(weighed, options)
  grads = optax.tree.cast_like(grads, params)
  zero = jnp.zeros([], jnp.float32)
  norm = global_norm(ascent_gradient(grads))
  return Outcome(
    loss=loss,
    carry=mean(carry, options.axes),
    aux=aux,
    weight=weighed.weight,
    grads=grads,
    advance=lambda is_finite=None: state,
    info=SharpnessInfo(loss, norm, zero, zero, zero),
  )


def _keeps_first_gradient(options: Options, state: optax.OptState) -> bool:
  """Whether to keep the mean of the first gradients, for the average.

  Where all ascend along it, it exists. Elsewhere it costs an all-reduce, or a
  tree for the sum over the parts, and is taken only if it updates an average.
  """
  if not options.is_local:
    return True
  return options.ema_gradient == "ascent" and not is_memoryless(state)


def _together(gradients: Gradients, ascent: Ascent) -> Outcome:
  """All parts take the first pass; then all, perturbed alike, the second."""
  options, mark = gradients.options, gradients.mark_varying
  keeps = _keeps_first_gradient(options, ascent.state)
  params = mark(ascent.params)
  first, carry = gradients.over_parts(
    lambda *part: gradients.first(params, ascent.gate, *part)
  )
  aux = gradients.aux_of(first)
  grads, weight = mean((first.grads, first.weight), options.ascent_axes)
  group = Weighed(None, None, grads, weight)
  gradient = group.divided().grads
  epsilon, state, norms = ascent.perturb(gradient)
  measured = ascent.measure(gradient)
  # The replicas along these axes have perturbations of their own.
  norms, measured = mean((norms, measured), options.other_axes)
  mean_gradient = lambda: mean(group, options.other_axes).divided().grads
  loss, _ = _loss_and_grads(first._replace(grads=None), options)
  gradient = mean_gradient() if keeps else None

  def descend(perturbed):
    perturbed = mark(perturbed)
    # The carry is dropped: BatchNorm's statistics are those of the first pass,
    # at the parameters that are trained.
    second, _ = gradients.over_parts(
      lambda *part: gradients.second(perturbed, *part)
    )
    return _loss_and_grads(second, options)

  def stay(kept):
    if kept is None:
      kept = mean_gradient() if gradient is None else gradient
    return loss, kept

  perturbed_loss, grads = ascent.descend(
    epsilon, descend, stay, None if options.is_local else gradient
  )
  grads = optax.tree.cast_like(grads, ascent.params)  # Weights widen them.
  return Outcome(
    loss=loss,
    carry=mean(carry, options.axes),
    aux=aux,
    weight=first.weight,
    grads=grads,
    advance=_advance(ascent, options, grads, gradient, state, norms),
    info=_info(ascent, perturbed_loss, gradient, norms, measured),
  )


def _part_by_part(gradients: Gradients, ascent: Ascent) -> Outcome:
  """Each part takes both passes, with a perturbation of its own."""
  options, mark = gradients.options, gradients.mark_varying
  keeps = _keeps_first_gradient(options, ascent.state)
  params = mark(ascent.params)

  def both(part, index, carry):
    first, new_carry = gradients.first(params, ascent.gate, part, index, carry)
    gradient = first.divided().grads
    epsilon, _, norms = ascent.perturb(gradient)
    # From the carry of the first pass, which alone moves it.
    second = ascent.descend(
      epsilon,
      lambda perturbed: mark(
        gradients.second(mark(perturbed), part, index, carry)[0]
      ),
      lambda grads: mark(first._replace(aux=None, grads=grads)),
      first.grads,
    )
    measured = ascent.measure(gradient)
    if not keeps:
      first = first._replace(grads=None)
    return (first, second, norms, measured), new_carry

  (first, second, norms, measured), carry = gradients.over_parts(both)
  norms, measured, carry = mean((norms, measured, carry), options.axes)
  perturbed_loss, grads = _loss_and_grads(second, options)
  loss, gradient = _loss_and_grads(first, options)
  grads = optax.tree.cast_like(grads, ascent.params)  # Weights widen them.
  return Outcome(
    loss=loss,
    carry=carry,
    aux=gradients.aux_of(first),
    weight=first.weight,
    grads=grads,
    advance=_advance(ascent, options, grads, gradient, ascent.state, norms),
    info=_info(ascent, perturbed_loss, gradient, norms, measured),
  )


def _loss_and_grads(
  weighed: Weighed, options: Options
) -> tuple[jax.Array, PyTree]:
  """The means over all replicas."""
  means = mean(weighed._replace(aux=None), options.axes).divided()
  return means.loss, means.grads


def _advance(ascent, options, grads, first_gradient, state, norms):
  """The function that returns the perturbation's state after the step."""

  def advance(is_finite=None):
    if options.ema_gradient == "descent":
      return ascent.advance(grads, norms, is_finite)
    if not options.is_local:
      return state
    # Without an average the state only counts the update, with any gradient.
    last = grads if first_gradient is None else first_gradient
    # A mean is finite where all its terms are: no norm of it is taken. Of
    # float16 it is not, because their sum may overflow.
    is_finite = jnp.isfinite(norms.direction)
    if any(x.dtype == jnp.float16 for x in jax.tree.leaves(last)):
      is_finite &= jnp.isfinite(global_norm(last))
    return ascent.advance(last, norms, is_finite)

  return advance


def _info(ascent, perturbed_loss, first_gradient, norms, measured):
  """The scalars, of the mean of the first gradients where it is kept."""
  if first_gradient is not None:
    measured = ascent.measure(first_gradient)
  perturbation_norm = norms.perturbation
  if ascent.gate is not True:
    perturbation_norm = jnp.where(ascent.gate, perturbation_norm, 0.0)
  return SharpnessInfo(
    perturbed_value=perturbed_loss,
    gradient_norm=measured[0],
    direction_norm=norms.direction,
    perturbation_norm=perturbation_norm,
    gradient_ema_cosine=measured[1],
  )


def _check_params(params):
  if not (leaves := leaves_by_path(params)):
    raise ValueError("`params` must hold at least one array, got none.")
  for path, x in leaves:
    dtype = dtype_of(x)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        "`params` must hold floating-point arrays, got "
        f"{type(x).__name__ if dtype is None else dtype} at {path}. Close over "
        "it, or put it into the model state; in Equinox call `params, static = "
        "eqx.partition(model, eqx.is_inexact_array)`."
      )

"""The engine: both passes of a step, over parts of a batch and named axes.

There are two schedules. Where all parts of the batch ascend along one gradient,
that gradient has to be complete before any part can take its second pass: all
take the first, then all the second (:func:`_together`). Where each part ascends
along its own, it takes both passes before the next part begins, which needs the
memory of one part and no sum of first gradients (:func:`_part_by_part`).
"""

import dataclasses
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
import optax

from fsam_optax._axes import mean
from fsam_optax._axes import varying
from fsam_optax._cosine import cosine
from fsam_optax._gradients import Gradients
from fsam_optax._options import Options
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation_state import find_state
from fsam_optax._perturbation_state import is_memoryless
from fsam_optax._perturbation_state import radius_norms
from fsam_optax._perturbation_state import state_difference
from fsam_optax._perturbation_state import with_radius_norms
from fsam_optax._tree_paths import leaves_by_path


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


class Outcome(NamedTuple):
  """What a step's passes found.

  Attributes:
    loss: of the first pass, shape ``[]``.
    carry: of the first pass over the last part of the batch.
    aux: of the first pass.
    grads: at the perturbed parameters, tree, shapes and dtypes of these.
    advance: ``advance(is_finite=None)`` returns the perturbation's state after
      the step. With ``ema_gradient="descent"`` a caller that updates the
      parameters in a branch calls it there, and where the branch is taken for
      finite gradients alone, says so: then no norm is taken for that.
    info: what is worth looking at.
  """

  loss: jax.Array
  carry: Any
  aux: Any
  grads: optax.Updates
  advance: Callable[..., optax.OptState]
  info: SharpnessInfo


def two_passes(
  perturbation: optax.GradientTransformation,
  options: Options,
  loss_fn: Callable[..., Any],
  params: optax.Params,
  perturbation_state: optax.OptState,
  batch: Any,
  carry: Any = None,
  *,
  step: Any = None,
  loss_scale: Any = None,
) -> Outcome:
  """Both passes of one step.

  Args:
    perturbation: from gradients to perturbations.
    options: which rows, replicas and steps ascend, and along what.
    loss_fn: ``loss_fn(params, part, index, carry)`` returns ``(loss, (carry,
      aux))`` for the part of the batch at ``index``.
    params: the clean parameters.
    perturbation_state: of the perturbation.
    batch: a tree of arrays with the rows in front.
    carry: what the first part gets; passes from part to part.
    step: the number that the gates go by, None where it is not known.
    loss_scale: what the loss is multiplied by before it is differentiated; the
      gradients are divided by it again, in float32 at least.

  Returns:
    The outcome.
  """
  check_perturbation(perturbation)
  _check_params(params)
  if found := state_difference(perturbation, perturbation_state, params):
    raise ValueError(
      "`perturbation_state` must be that of `perturbation.init(params)`, with "
      f"{found}."
    )
  gradients = Gradients(loss_fn, options, batch, carry, loss_scale)
  ascent = _Ascent(perturbation, perturbation_state, params, options.gate(step))
  schedule = _part_by_part if options.is_part_by_part else _together
  return _concluded(ascent, options, schedule(gradients, ascent))


def one_pass(
  options: Options,
  loss_fn: Callable[..., Any],
  params: optax.Params,
  batch: Any,
  carry: Any = None,
  *,
  loss_scale: Any = None,
) -> Outcome:
  """A step without a perturbation: the gradient at the clean parameters.

  Args:
    options: of which the axes and the number of micro-batches count.
    loss_fn: ``loss_fn(params, part, index, carry)`` returns ``(loss, (carry,
      aux))`` for the part of the batch at ``index``.
    params: the parameters.
    batch: a tree of arrays with the rows in front.
    carry: what the first part gets; passes from part to part.
    loss_scale: what the loss is multiplied by before it is differentiated; the
      gradients are divided by it again, in float32 at least.

  Returns:
    The outcome, whose perturbation has no state and no length.
  """
  _check_params(params)
  options = dataclasses.replace(options, ascent_fraction=1.0)
  gradients = Gradients(loss_fn, options, batch, carry, loss_scale)
  marked = varying(params, options.axes)
  outputs = gradients.over_parts(lambda *part: gradients.at(marked, *part))
  (loss, aux, grads), carry = mean(outputs, options.axes)
  zero = jnp.zeros([], jnp.float32)
  info = SharpnessInfo(loss, global_norm(grads), zero, zero, zero)
  return Outcome(
    loss, carry, aux, grads, lambda is_finite=None: optax.EmptyState(), info
  )


@dataclasses.dataclass(frozen=True)
class _Ascent:
  """The perturbation of one step, and whether the step takes it."""

  perturbation: optax.GradientTransformation
  state: optax.OptState
  params: optax.Params
  gate: Any  # True, False or a traced bool.

  def perturb(self, gradient: Any, **extra) -> tuple[Any, Any, list[Any]]:
    """The perturbation, the next state, and the norms of both steps to it."""
    # For complex parameters JAX's gradient is the conjugate of the ascent.
    update = optax.with_extra_args_support(self.perturbation).update
    epsilon, state = update(
      jax.tree.map(jnp.conj, gradient), self.state, self.params, **extra
    )
    norms = radius_norms(state)
    if not norms:  # Not one of ours: measure.
      norms = [(global_norm(gradient), global_norm(epsilon))]
    return epsilon, state, norms

  def advance(
    self, gradient: Any, norms: list[Any], is_finite: Optional[bool]
  ) -> optax.OptState:
    """The next state where another gradient feeds the average than ascends.

    The state is updated twice, and of either update only one half is read: the
    perturbation of the first, the average of the second. XLA drops the others.
    """
    _, state, _ = self.perturb(gradient, is_finite=is_finite)
    return with_radius_norms(state, norms)

  def measure(self, gradient: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient's norm, and its cosine with the average before the step."""
    norm = global_norm(gradient)
    found = find_state(SubtractGradientEmaState, self.state)
    if found is None:
      return norm, jnp.zeros_like(norm)
    # The average is that of the conjugate gradients.
    ema = jax.tree.map(jnp.conj, found.ema)
    return norm, cosine(ema, gradient)

  def descend(
    self,
    epsilon: Any,
    descend: Callable[[Any], Any],
    stay: Callable[[], Any],
    mark: Callable[[Any], Any],
  ) -> Any:
    """What `descend(perturbed)` returns, or `stay()` where the gate is shut."""
    if self.gate is False:
      return stay()
    # Outside the branch, or it would hold the perturbation besides.
    perturbed = mark(optax.apply_updates(self.params, epsilon))
    if self.gate is True:
      return descend(perturbed)
    return jax.lax.cond(self.gate, lambda: descend(perturbed), stay)


class _Ran(NamedTuple):
  """What a schedule leaves for the conclusion, alike on all replicas."""

  loss: Any
  carry: Any
  aux: Any
  perturbed_loss: Any
  grads: Any
  first_gradient: Any  # The mean over all replicas and parts, or None.
  state: Any  # Of the perturbation, after the ascent's gradient.
  norms: Any
  measured: Any


def _keeps_first_gradient(options: Options, state: optax.OptState) -> bool:
  """Whether the mean of the first gradients is wanted for the average.

  It is there where all ascend along it. Else it costs an all-reduce, or a tree
  to sum the parts in, and is formed only for an average that takes it in.
  """
  if not options.is_local:
    return True
  return options.ema_gradient == "ascent" and not is_memoryless(state)


def _together(gradients: Gradients, ascent: _Ascent) -> _Ran:
  """All parts take the first pass, then, perturbed alike, all the second."""
  options, mark = gradients.options, gradients.mark_varying
  keeps = _keeps_first_gradient(options, ascent.state)
  params = mark(ascent.params)
  (loss, aux, gradient), carry = gradients.over_parts(
    lambda *part: gradients.first(params, ascent.gate, *part)
  )
  gradient = mean(gradient, options.ascent_axes)
  epsilon, state, norms = ascent.perturb(gradient)
  measured = ascent.measure(gradient)
  # The replicas along these axes have perturbations of their own.
  norms, measured = mean((norms, measured), options.other_axes)
  if keeps:
    gradient = mean(gradient, options.other_axes)

  def descend(perturbed):
    # The carry is dropped: BatchNorm's statistics are to be those of the
    # parameters that are trained, at which each part was seen once already.
    outputs, _ = gradients.over_parts(
      lambda *part: gradients.second(perturbed, *part)
    )
    return mean(outputs, options.axes)

  def stay():
    grads = gradient if keeps else mean(gradient, options.other_axes)
    return mean(loss, options.axes), grads

  perturbed_loss, grads = ascent.descend(epsilon, descend, stay, mark)
  loss, aux, carry = mean((loss, aux, carry), options.axes)
  return _Ran(
    loss,
    carry,
    aux,
    perturbed_loss,
    grads,
    gradient if keeps else None,
    state,
    norms,
    measured,
  )


def _part_by_part(gradients: Gradients, ascent: _Ascent) -> _Ran:
  """Each part takes both passes, along a perturbation of its own."""
  options, mark = gradients.options, gradients.mark_varying
  keeps = _keeps_first_gradient(options, ascent.state)
  params = mark(ascent.params)

  def both(part, index, carry):
    (loss, aux, gradient), new_carry = gradients.first(
      params, ascent.gate, part, index, carry
    )
    epsilon, _, norms = ascent.perturb(gradient)
    # From the same carry as the first pass, whose new one alone goes on.
    perturbed_loss, grads = ascent.descend(
      epsilon,
      lambda perturbed: mark(
        gradients.second(perturbed, part, index, carry)[0]
      ),
      lambda: mark((loss, gradient)),
      mark,
    )
    measured = ascent.measure(gradient)
    kept = gradient if keeps else None
    outputs = (loss, aux, perturbed_loss, grads, kept, norms, measured)
    return outputs, new_carry

  outputs, carry = mean(gradients.over_parts(both), options.axes)
  loss, aux, perturbed_loss, grads, gradient, norms, measured = outputs
  return _Ran(
    loss,
    carry,
    aux,
    perturbed_loss,
    grads,
    gradient,
    ascent.state,
    norms,
    measured,
  )


def _concluded(ascent: _Ascent, options: Options, ran: _Ran) -> Outcome:
  """The outcome: which gradient the average takes in, and the scalars."""
  gradient, norms = ran.first_gradient, ran.norms

  def advance(is_finite=None):
    if options.ema_gradient == "descent":
      return ascent.advance(ran.grads, norms, is_finite)
    if options.is_local:
      # With nothing to remember, any gradient serves to count the update.
      last = ran.grads if gradient is None else gradient
      return ascent.advance(last, norms, None)
    return ran.state

  measured = ran.measured if gradient is None else ascent.measure(gradient)
  gradient_norm, gradient_ema_cosine = measured
  direction_norm, perturbation_norm = norms[0]
  if ascent.gate is not True:
    perturbation_norm = jnp.where(ascent.gate, perturbation_norm, 0.0)
  info = SharpnessInfo(
    perturbed_value=ran.perturbed_loss,
    gradient_norm=gradient_norm,
    direction_norm=direction_norm,
    perturbation_norm=perturbation_norm,
    gradient_ema_cosine=gradient_ema_cosine,
  )
  return Outcome(ran.loss, ran.carry, ran.aux, ran.grads, advance, info)


def _check_params(params):
  if not (leaves := leaves_by_path(params)):
    raise ValueError("`params` must hold at least one array, got none.")
  for path, x in leaves:
    dtype = getattr(x, "dtype", None) or jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"`params` must hold floating-point arrays, got {dtype} at {path}. "
        "Close over it, or keep it in the model state."
      )

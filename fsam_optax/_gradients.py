"""The loss and its gradient on the parts of a batch, in either pass."""

import dataclasses
from typing import Any, Callable

import jax

from fsam_optax._axes import check_bound
from fsam_optax._axes import varying
from fsam_optax._batch import check_batch
from fsam_optax._batch import fraction_of_rows
from fsam_optax._batch import mean_over_parts
from fsam_optax._loss import check_averaged
from fsam_optax._loss import check_loss
from fsam_optax._loss import check_same_aux
from fsam_optax._options import Options
from fsam_optax._perturbation import widen


@dataclasses.dataclass(frozen=True)
class Gradients:
  """The loss and its gradient on the parts of one batch.

  Attributes:
    loss_fn: see :func:`fsam_optax._two_passes.two_passes`.
    options: which rows and replicas take part.
    batch: a tree of arrays with the rows in front.
    carry: what the first part gets.
    loss_scale: what the loss is multiplied by before it is differentiated, or
      None.
  """

  loss_fn: Callable[..., Any]
  options: Options
  batch: Any
  carry: Any
  loss_scale: Any

  def __post_init__(self):
    check_bound(self.options.axes)
    check_batch(
      self.batch, self.options.num_microbatches, self.options.ascent_fraction
    )

  def over_parts(self, fn: Callable[..., Any]) -> tuple[Any, Any]:
    """Means over the parts of what `fn` returns, and the last carry.

    Args:
      fn: ``fn(part, index, carry)`` returns ``(outputs, carry)``.

    Returns:
      The means, and the carry of the last part. Both passes start from the same
      one.
    """
    return mean_over_parts(
      fn,
      self.batch,
      self.options.num_microbatches,
      self.carry,
      self.mark_varying,
    )

  def mark_varying(self, tree: Any) -> Any:
    """Marks arrays as different on each replica."""
    return varying(tree, self.options.axes)

  def at(self, params: Any, part: Any, index: Any, carry: Any):
    """Returns `((loss, aux, gradient), carry)` on one part."""
    options, scale = self.options, self.loss_scale

    def scaled_loss(params):
      loss, (new_carry, aux) = self.loss_fn(params, part, index, carry)
      check_loss(loss)
      if options.axes or options.num_microbatches > 1:
        check_averaged(aux)
      scaled = loss if scale is None else loss * scale
      return scaled, (loss, new_carry, aux)

    grads, (loss, carry, aux) = jax.grad(scaled_loss, has_aux=True)(params)
    if scale is not None:
      grads = jax.tree.map(lambda g: widen(g) / scale, grads)
    return (loss, aux, grads), carry

  def first(self, params: Any, gate: Any, part: Any, index: Any, carry: Any):
    """The pass at the clean parameters: all rows where nothing ascends."""
    options = self.options
    whole = lambda: self.at(params, part, index, carry)
    fewer = lambda: self.at(
      params, fraction_of_rows(part, options.ascent_fraction), index, carry
    )
    with jax.named_scope("ascent"):
      if gate is False or options.ascent_fraction == 1:
        return whole()
      if gate is True:
        return fewer()
      check_same_aux(fewer, whole)
      return jax.lax.cond(
        gate,
        lambda: self.mark_varying(fewer()),
        lambda: self.mark_varying(whole()),
      )

  def second(self, params: Any, part: Any, index: Any, carry: Any):
    """The pass at the perturbed parameters: `((loss, gradient), carry)`."""
    with jax.named_scope("descent"):
      (loss, _, grads), carry = self.at(params, part, index, carry)
    return (loss, grads), carry

"""The loss and its gradient on the parts of a batch, in either pass."""

import dataclasses
import functools
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike

from fsam_optax._axes import varying
from fsam_optax._fsam import check_bound
from fsam_optax._loss import check_averaged
from fsam_optax._loss import check_loss
from fsam_optax._loss import check_same_aux
from fsam_optax._loss import weight_of
from fsam_optax._microbatches import check_batch
from fsam_optax._microbatches import fraction_of_rows
from fsam_optax._microbatches import mean_over_parts
from fsam_optax._options import Options
from fsam_optax._perturbation import map_weights
from fsam_optax._perturbation import widen
from fsam_optax._tracing import TracedOnce
from fsam_optax._trees import PyTree


class Weighed(NamedTuple):
  """The results of one pass, ready for means over parts and replicas.

  With the option `weight`, loss, aux and gradient are those of a part times its
  weight: their mean divided by the mean weight is a mean over all rows.
  """

  loss: Optional[jax.Array]
  aux: PyTree  # Times the weight with more than one part alone.
  grads: PyTree
  weight: Optional[jax.Array]  # None without the option.

  def divided(self) -> "Weighed":
    """Loss and gradient divided by the weight; 0 where the weight is 0."""
    loss, grads = divided((self.loss, self.grads), self.weight)
    return self._replace(loss=loss, grads=grads)


def times(tree: PyTree, weight: Optional[jax.Array]) -> PyTree:
  """A tree times a weight; 0 where the weight is 0, even for NaN."""
  if weight is None:
    return tree
  # Selected: the mean of no rows is 0 / 0, which is NaN also times zero.
  return map_weights(
    lambda x: jnp.where(weight == 0, 0.0, widen(x) * weight), tree
  )


def divided(tree: PyTree, weight: Optional[jax.Array]) -> PyTree:
  """Undoes :func:`times`, after sums or means of both."""
  if weight is None:
    return tree
  safe = jnp.where(weight == 0, 1.0, weight)
  return map_weights(lambda x: x / safe, tree)


@dataclasses.dataclass(frozen=True)
class Gradients:
  """The loss and its gradient on the parts of one batch.

  For the attributes see :func:`fsam_optax._two_passes.two_passes`.
  """

  loss_fn: Callable[..., Any]
  options: Options
  batch: PyTree
  carry: PyTree
  loss_scale: Optional[ArrayLike]

  def __post_init__(self):
    check_bound(self.options.axes)
    check_batch(
      self.batch, self.options.num_microbatches, self.options.ascent_fraction
    )

  def over_parts(self, fn: Callable[..., Any]) -> tuple[PyTree, PyTree]:
    """Means over the parts, and the last carry, by :func:`mean_over_parts`."""
    return mean_over_parts(
      fn,
      self.batch,
      self.options.num_microbatches,
      self.carry,
      self.mark_varying,
    )

  def mark_varying(self, tree: PyTree) -> PyTree:
    """Marks arrays as different on each replica."""
    return varying(tree, self.options.axes)

  def at(
    self, params: PyTree, part: PyTree, index: ArrayLike, carry: PyTree
  ) -> tuple[Weighed, PyTree]:
    """Loss and gradient on one part, and the new carry.

    Where the shapes are the same, the loss is traced once for all parts and
    both passes.
    """
    params = jax.tree.map(jnp.asarray, params)  # Some may be Python numbers.
    return self._traced(params, part, index, carry)

  @functools.cached_property
  def _traced(self) -> TracedOnce:
    return TracedOnce(self._at)

  def _at(self, params, part, index, carry):
    options, scale = self.options, self.loss_scale
    has_parts = options.num_microbatches > 1

    def scaled_loss(params):
      loss, (new_carry, aux) = self.loss_fn(params, part, index, carry)
      check_loss(loss)
      if options.weight is not None:
        own = weight_of(aux, options.weight)
        aux = {**aux, options.weight: own}
      if has_parts:
        check_averaged(aux)
      scaled = loss if scale is None else loss * scale
      # Each replica differentiates its own loss. If the loss has a sum over
      # the axis, the transpose of the sum adds up their gradients.
      return self.mark_varying(scaled), (loss, new_carry, aux)

    before = dict(jax.tree_util.tree_leaves_with_path(carry))
    grads, (loss, carry, aux) = jax.grad(scaled_loss, has_aux=True)(params)
    if scale is not None:
      grads = map_weights(lambda g: widen(g) / scale, grads)
    weight = None
    if options.weight is not None:
      weight = aux[options.weight]
      grads = map_weights(
        lambda g, _: g,
        grads,
        params,
        # The maximum over no rows is NaN, and must not overwrite the old one.
        overwritten=lambda new, old: jnp.where(jnp.isnan(new), old, new),
      )
      # Statistics of no rows are no numbers, either. Counters and keys move on.
      carry = jax.tree_util.tree_map_with_path(
        lambda path, new: (
          jnp.where(weight == 0, before.get(path, new), new)
          if jnp.issubdtype(jnp.result_type(new), jnp.inexact)
          else new
        ),
        carry,
      )
      loss, grads = times((loss, grads), weight)
      aux = times(aux, weight) if has_parts else aux
    return Weighed(loss, aux, grads, weight), carry

  def aux_of(self, first: Weighed) -> PyTree:
    """The auxiliary outputs: means over the parts, the sum of the weight."""
    parts, name = self.options.num_microbatches, self.options.weight
    if first.weight is None or parts == 1:
      return first.aux
    return {**divided(first.aux, first.weight), name: first.weight * parts}

  def first(
    self,
    params: PyTree,
    gate: ArrayLike,
    part: PyTree,
    index: ArrayLike,
    carry: PyTree,
  ):
    """The pass at the clean parameters: on all rows if the step stays there."""
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

  def second(
    self, params: PyTree, part: PyTree, index: ArrayLike, carry: PyTree
  ) -> tuple[Weighed, PyTree]:
    """The pass at the perturbed parameters, without its aux."""
    with jax.named_scope("descent"):
      second, carry = self.at(params, part, index, carry)
    return second._replace(aux=None), carry

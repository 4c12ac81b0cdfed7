"""The checks of `checked=True`, for the first steps of a new loop."""

import dataclasses
from typing import Any, Callable

import jax
from jax import core
from jax import numpy as jnp
from jax.experimental import io_callback
import numpy as np

from fsam_optax._axes import mean
from fsam_optax._axes import varying
from fsam_optax._fsam import is_close
from fsam_optax._fsam import right_or_nan
from fsam_optax._gradients import Gradients
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbed_weights import Ascent
from fsam_optax._perturbed_weights import find_state
from fsam_optax._trees import PyTree
from fsam_optax._versions import bound_axes


def checked(
  gradients: Gradients, ascent: Ascent, outcome: Any
) -> tuple[jax.Array, PyTree]:
  """Loss and gradient of a step, or an error (compiled: NaN) for a mistake."""
  marked = gradients.mark_varying(ascent.params)

  def first(gradients):
    weighed, _ = gradients.over_parts(
      lambda *part: gradients.first(marked, ascent.gate, *part)
    )
    return weighed.divided()

  # A copy has no trace of the loss, so it calls the loss again.
  seen, again = first(gradients), first(dataclasses.replace(gradients))
  is_pure = is_close(seen.loss, again.loss) & is_close(seen.grads, again.grads)
  average = find_state(SubtractGradientEmaState, ascent.state)
  counted = ScaleToRadiusState if average is None else SubtractGradientEmaState
  before = find_state(counted, ascent.state)
  after = find_state(counted, outcome.advance())
  faults: list[tuple[Any, str]] = [(is_pure, _IMPURE)]
  axes = bound_axes()
  if average is not None and average.ema is not None:
    for axis in axes:
      is_alike = _average_alike(ascent.params, average.ema, outcome.grads, axis)
      faults.append((is_alike, _apart(axis)))
  if before and after:  # Another perturbation may have no count.
    # A step is skipped for any of these.
    results = outcome.loss, outcome.info.perturbed_value, outcome.grads
    is_carried_on = _is_carried_on(
      before.count, after.count, results, gradients.options.moved_from, axes
    )
    faults.append((is_carried_on, _NOT_CARRIED_ON))
  outputs = outcome.loss, outcome.grads
  for is_right, message in faults:
    if axes:
      # The same on all replicas, like the gradient that it sets to NaN.
      is_wrong = varying(~is_right, axes).astype(jnp.int32)
      is_right = jax.lax.pmax(is_wrong, axes) == 0
    outputs = right_or_nan(outputs, is_right, message)
  return outputs


def _average_alike(params, average, grads, axis):
  """Whether replicas of the same parameters have the same average."""
  is_alike = lambda tree: is_close(tree, mean(tree, (axis,)))
  return ~is_alike(params) | (is_alike(average) & is_alike(grads))


def _apart(axis):
  return (
    f"`axis_name` must name {axis!r}, along which replicas of the same "
    "parameters got different gradients, and so different averages. Give "
    f"`axis_name={axis!r}`; a mean that the loop takes afterwards does not "
    "enter the average."
  )


_IMPURE = (
  "`loss_fn` must return the same when it is called again with the same "
  "arguments, got another loss or gradient. Draw keys and rows before the "
  "call, and pass them as arguments."
)
_NOT_CARRIED_ON = (
  "The perturbation's state must be carried on, got the state of the last call "
  "again: its average never changes. Give the state that the last call "
  "returned. Two models that take turns need a function each."
)


def _is_carried_on(before, after, results, moved_from, axes):
  """Whether the state is another than the one of the last call."""
  before, after = jnp.asarray(before), jnp.asarray(after)
  # After a skipped step the same state may come again.
  finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(results)]
  has_moved = (after != before) & jnp.stack(finite).all()
  replica = jax.lax.axis_index(axes) if axes else jnp.zeros([], jnp.int32)

  def on_host(replica, before, has_moved):
    key, count = int(replica), int(before)
    is_right = moved_from.get(key) != count
    moved_from[key] = count if has_moved else None
    return np.asarray(is_right)

  arguments = replica, before, has_moved
  if not any(isinstance(x, core.Tracer) for x in arguments):
    return on_host(*arguments)
  return _ask(on_host)(*arguments)


def _ask(on_host: Callable[..., np.ndarray]):
  """Calls the host; under `jax.vmap` once, for the first of the axis."""

  @jax.custom_batching.custom_vmap
  def ask(*arguments):
    return io_callback(on_host, jax.ShapeDtypeStruct([], bool), *arguments)

  @ask.def_vmap
  def _(axis_size, is_batched, *arguments):
    del axis_size
    first = (
      x[0] if batched else x
      for x, batched in zip(arguments, is_batched, strict=True)
    )
    return ask(*first), False

  return ask

"""An ascent that is watched: its state holds what was seen of each step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import numpy as jnp
import optax


class WatchedState(NamedTuple):
  """State of :func:`watched`.

  Attributes:
    count: steps taken, shape ``[]``, int32.
    inner: of the ascent.
    seen: what was seen.
  """

  count: Any
  inner: Any
  seen: Any


def watched(
  inner: optax.GradientTransformation,
  start: Callable[[Any], Any],
  see: Callable[..., Any],
) -> optax.GradientTransformationExtraArgs:
  """Watches an ascent, for the step of ``directions``.

  Args:
    inner: the ascent.
    start: from the parameters to what is seen before the first step.
    see: from what was seen, the number of the step, the batch's gradient and
      that on all training rows to what is seen now.

  Returns:
    The same ascent.
  """

  def init_fn(params):
    return WatchedState(
      jnp.zeros([], jnp.int32), inner.init(params), start(params)
    )

  def update_fn(updates, state, params=None, **extra_args):
    full = extra_args["gradient_on"]("whole")
    seen = see(state.seen, state.count, updates, full)
    updates, inner_state = inner.update(updates, state.inner, params)
    count = optax.safe_increment(state.count)
    return updates, WatchedState(count, inner_state, seen)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)

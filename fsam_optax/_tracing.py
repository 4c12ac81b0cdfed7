"""Traces the loss once for both passes.

The Python code of a compiled function runs when it is traced. With a trace for
each pass, a loss that draws a key or pops a label would do so twice. And in an
uncompiled step `jax.lax.cond` and `jax.lax.scan` would compile at each call,
because they would get a new function each time.
"""

import dataclasses
from typing import Any, Callable

import jax
from jax import core
from jax import numpy as jnp


def is_staged() -> bool:
  """Whether operations are recorded for a compiler, and not run now."""
  # There a constant is a tracer. Under an uncompiled `jax.vmap` or `jax.grad`
  # it is not.
  return isinstance(jnp.zeros([]), core.Tracer)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
  """Carries a leaf that is no array into a trace; equal if identical."""

  value: Any

  def __eq__(self, other):
    return isinstance(other, _Static) and self.value is other.value

  def __hash__(self):
    return id(self.value)


class TracedOnce:
  """A function whose Python code runs once for arguments of one kind.

  Arguments are of one kind if their structures, shapes and dtypes are equal,
  and their leaves other than arrays are the same objects. Later calls repeat
  the recorded operations: in a compiled program they share one trace, and
  elsewhere the operations run one by one, without another compilation.

  Python code that reads the value of an array cannot be recorded. In a compiled
  program it raises its error. Elsewhere such a function is called each time,
  as every function is under :func:`jax.disable_jit`.
  """

  def __init__(self, fn: Callable[..., Any]):
    """Takes a function of trees."""
    self._fn = fn
    self._traces = {}
    config: Any = jax.config
    self._runs = config.jax_disable_jit

  def __call__(self, *args: Any) -> Any:
    """The outputs of the function, in new containers at each call."""
    leaves, structure = jax.tree.flatten(args)
    if self._runs:
      return self._fn(*jax.tree.unflatten(structure, leaves))
    leaves = [x if isinstance(x, jax.Array) else _Static(x) for x in leaves]
    arrays = jax.tree.leaves(leaves)
    types = [jax.typeof(x) for x in arrays]
    # Parameters may be of a weak type in the first pass of a run.
    strong = tuple(x.strip_weak_type() for x in types)
    kind = structure, jax.tree.structure(leaves), strong
    if kind not in self._traces:
      # Without the arrays: to keep a tracer is a leak.
      like = [x if isinstance(x, _Static) else None for x in leaves]
      self._traces[kind] = *self._traceable(structure, like), types
    traceable, rest, first = self._traces[kind]
    if is_staged() and types == first:
      # Inlined, because a call inside a conditional copies its arguments on a
      # TPU.
      outputs = jax.jit(traceable, inline=True)(*arrays)
    else:
      try:
        jaxpr = jax.make_jaxpr(traceable)(*first)
      except (TypeError, ValueError, AttributeError, IndexError):
        # Errors of JAX are some of these, and those of Python where a value is
        # missing, as in a format. No others: the loss may have read a row.
        if is_staged():
          raise
        self._runs = True
      if self._runs:
        return self(*args)
      outputs = core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arrays)
    left = iter(outputs)
    leaves = [next(left) if x is None else x.value for x in rest["leaves"]]
    return jax.tree.unflatten(rest["structure"], leaves)

  def _traceable(self, structure, like):
    """The function from arrays to a list of arrays, and what else it returns.

    That is not an output of the trace, which caches of JAX would keep.
    """
    fn, rest = self._fn, {}

    def gradient(*arrays):
      left = iter(arrays)
      args = [next(left) if x is None else x.value for x in like]
      outputs = fn(*jax.tree.unflatten(structure, args))
      leaves, rest["structure"] = jax.tree.flatten(outputs)
      is_array = lambda x: isinstance(x, jax.Array)
      rest["leaves"] = [None if is_array(x) else _Static(x) for x in leaves]
      return list(filter(is_array, leaves))

    return gradient, rest

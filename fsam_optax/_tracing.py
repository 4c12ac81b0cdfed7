"""What is traced, and how often: once for both passes, or not at all.

Compiled, a function's Python code runs when it is traced, and a loss that draws
a key or pops a label would do so once for each pass. Uncompiled, `jax.lax.cond`
and `jax.lax.scan` compile anew at each call, because what they get are new
functions each time.
"""

import dataclasses
from typing import Any, Callable

import jax
from jax import core
from jax import numpy as jnp


def is_staged() -> bool:
  """Whether operations are being recorded, to be compiled, and not run now."""
  # Where they are, a constant is a tracer, too. Under an uncompiled `jax.vmap`
  # or `jax.grad` it is not.
  return isinstance(jnp.zeros([]), core.Tracer)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
  """What is no array passes through a trace as it is: equal if identical."""

  value: Any

  def __eq__(self, other):
    return isinstance(other, _Static) and self.value is other.value

  def __hash__(self):
    return id(self.value)


class TracedOnce:
  """A function whose Python code runs once for arguments of one kind.

  Of one kind are arguments of equal structure, shapes and dtypes whose leaves
  other than arrays are the same objects. What the function draws or pops, it
  draws or pops once, and later calls repeat what was recorded. Compiled, the
  calls share one trace. Uncompiled, the recorded operations run one by one, and
  nothing is compiled that plain JAX would not compile.

  Python code that asks for the value of an array cannot be recorded. Compiled,
  JAX says so. Uncompiled such a function is called each time, after a test that
  it returns the same when it is called again; so is every function under
  :func:`jax.disable_jit`.
  """

  def __init__(
    self, fn: Callable[..., Any], check_same: Callable[[Any, Any], None]
  ):
    """Takes a function of trees, and what raises unless two outputs agree."""
    self._fn = fn
    self._check_same = check_same
    self._traces = {}
    config: Any = jax.config
    self._runs = config.jax_disable_jit
    self._was_tested = False

  def __call__(self, *args: Any) -> Any:
    """What the function returns, with containers of its own at each call."""
    leaves, structure = jax.tree.flatten(args)
    if self._runs:
      return self._run(structure, leaves)
    leaves = [x if isinstance(x, jax.Array) else _Static(x) for x in leaves]
    arrays = jax.tree.leaves(leaves)
    types = [jax.typeof(x) for x in arrays]
    # Of a weak type parameters are in the first pass of a run alone.
    strong = tuple(x.strip_weak_type() for x in types)
    kind = structure, jax.tree.structure(leaves), strong
    if kind not in self._traces:
      # The arrays themselves are no part of it: JAX would call that a leak.
      like = [x if isinstance(x, _Static) else None for x in leaves]
      self._traces[kind] = self._traceable(structure, like), types
    traceable, first = self._traces[kind]
    if is_staged() and types == first:
      # A call of its own inside a conditional costs a TPU copies of its
      # arguments.
      outputs = jax.jit(traceable, inline=True)(*arrays)
    else:
      try:
        jaxpr, shapes = jax.make_jaxpr(traceable, return_shape=True)(*first)
      except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        if is_staged():
          raise
        self._runs = True
        return self(*args)
      outputs = jax.tree.unflatten(
        jax.tree.structure(shapes),
        core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *arrays),
      )
    structure, *leaves = (
      x.value if isinstance(x, _Static) else x for x in outputs
    )
    return jax.tree.unflatten(structure, leaves)

  def _traceable(self, structure, like):
    """The function from arrays to a list of arrays and what is none."""

    def gradient(*arrays):
      left = iter(arrays)
      args = [next(left) if x is None else x.value for x in like]
      outputs = self._fn(*jax.tree.unflatten(structure, args))
      leaves, returned = jax.tree.flatten(outputs)
      return [
        x if isinstance(x, jax.Array) else _Static(x)
        for x in (returned, *leaves)
      ]

    return gradient

  def _run(self, structure, leaves):
    run = lambda: self._fn(*jax.tree.unflatten(structure, leaves))
    outputs = run()
    if not self._was_tested:
      self._was_tested = True
      self._check_same(outputs, run())
    return outputs

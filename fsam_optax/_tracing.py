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


def branch(
  is_true: Any, if_true: Callable[[], Any], if_false: Callable[[], Any]
) -> Any:
  """`jax.lax.cond`; where the choice is a value already, that branch alone."""
  if isinstance(is_true, core.Tracer):
    return jax.lax.cond(is_true, if_true, if_false)
  return if_true() if is_true else if_false()


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
    """Takes the function.

    Args:
      fn: of trees, returns a tree; either may hold what is no array.
      check_same: raises where the outputs of two calls with the same arguments
        are not the same.
    """

    def gradient(*args):  # The name that profiles show.
      return _wrapped(fn(*_unwrapped(args)))

    self._fn = gradient
    self._check_same = check_same
    self._compiled = jax.jit(gradient)
    self._first = {}  # The arguments that each trace was made for, by kind.
    self._runs = jax.config.jax_disable_jit
    self._was_tested = False

  def __call__(self, *args: Any) -> Any:
    """What the function returns, with a container of its own at each call."""
    args = _wrapped(args)
    # Of a weak type parameters are at a run's first pass alone.
    kind = jax.tree.structure(args), *(
      jax.typeof(x).strip_weak_type() for x in jax.tree.leaves(args)
    )
    first = self._first.setdefault(kind, args)
    types = lambda tree: [jax.typeof(x) for x in jax.tree.leaves(tree)]
    if self._runs:
      outputs = self._run(args)
    elif is_staged() and types(args) == types(first):
      outputs = self._compiled(*args)
    else:
      outputs = self._evaluate(first, args)
    return _unwrapped(outputs)

  def _evaluate(self, first, args):
    """Evaluates, on arguments, the trace that was made for the first ones."""
    try:
      jaxpr, shapes = jax.make_jaxpr(self._fn, return_shape=True)(*first)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
      if is_staged():
        raise
      self._runs = True
      return self._run(args)
    leaves = core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(shapes), leaves)

  def _run(self, args):
    outputs = self._fn(*args)
    if not self._was_tested:
      self._was_tested = True
      self._check_same(_unwrapped(outputs), _unwrapped(self._fn(*args)))
    return outputs


def _wrapped(tree):
  return jax.tree.map(
    lambda x: x if isinstance(x, jax.Array) else _Static(x), tree
  )


def _unwrapped(tree):
  is_static = lambda x: isinstance(x, _Static)
  return jax.tree.map(
    lambda x: x.value if is_static(x) else x, tree, is_leaf=is_static
  )

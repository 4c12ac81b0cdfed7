"""Trees: their leaves by name, where two differ, and the cosine of two."""

from typing import Any, Callable, Optional

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen

# What JAX flattens: a container of arrays, or an array. No type can say so.
PyTree = Any


def joined_path(path: Any, separator: str = "/") -> str:
  """A path as its names alone, such as ``params/Dense_0/kernel``.

  Args:
    path: what :func:`jax.tree_util.tree_leaves_with_path` gives.
    separator: stands between the names.

  Returns:
    The names, joined.
  """
  return jax.tree_util.keystr(path, simple=True, separator=separator)


def leaves_by_path(tree: PyTree) -> list[tuple[str, Any]]:
  """Pairs of path and leaf, the path as an error spells it, never empty."""
  return [
    (jax.tree_util.keystr(path) or "the root", leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def shape_and_dtype(x: Any) -> str:
  """What a leaf is, such as ``float32[3]``; ``nothing`` where there is none."""
  if x is None:
    return "nothing"
  if hasattr(x, "dtype") or isinstance(x, (bool, int, float, complex)):
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}"
  return type(x).__name__


def difference(
  wanted: PyTree,
  found: PyTree,
  describe: Callable[[Any], str] = shape_and_dtype,
) -> Optional[str]:
  """Where two trees first differ, by the names of their leaves.

  Leaves are compared one by one, and never containers: nobody knows what ``==``
  means for a user's class.

  Args:
    wanted: arrays, or their shapes and dtypes.
    found: what came in its place.
    describe: what is compared of a leaf, None for a leaf that is missing.

  Returns:
    Such as ``"float32[3] at mean/bias, got float32[2]"``, or None.
  """
  by_name = [
    {
      joined_path(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (wanted, found)
  ]
  for name in [*by_name[0], *by_name[1]]:
    one, other = (describe(leaves.get(name)) for leaves in by_name)
    if one != other:
      return f"{one} at {name or 'the root'}, got {other}"
  return None


def cosine(tree: PyTree, other: PyTree, *, at_zero: float = 0.0) -> jax.Array:
  """The cosine between two trees, as vectors, in float32 at least.

  Args:
    tree: arrays, which may be complex; leaves that are
      :class:`optax.MaskedNode` are left out, of ``other`` too.
    other: arrays in the same tree.
    at_zero: what is returned where one of the two is zero.

  Returns:
    The real part of the inner product over the norms, shape ``[]``.
  """
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  other = jax.tree.map(
    lambda a, b: a if is_masked(a) else b, tree, other, is_leaf=is_masked
  )
  inner = optax.tree.sum(
    jax.tree.map(
      lambda a, b: jnp.sum(jnp.real(jnp.conj(widen(a)) * widen(b))), tree, other
    )
  )
  norms = global_norm(tree) * global_norm(other)
  # Selected, so that a zero divides nothing.
  return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), at_zero)

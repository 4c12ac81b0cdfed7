"""Trees: their leaves by name, and the cosine of two."""

from typing import Any

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen

# What JAX flattens: a container of arrays, or an array. No type can say so.
PyTree = Any


def joined_path(path: Any, separator: str = "/") -> str:
  """A path as its names alone, such as ``params/Dense_0/kernel``."""
  return jax.tree_util.keystr(path, simple=True, separator=separator)


def leaves_by_path(tree: PyTree) -> list[tuple[str, Any]]:
  """Pairs of path and leaf, the path as an error spells it, never empty."""
  return [
    (jax.tree_util.keystr(path) or "the root", leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def cosine(tree: PyTree, other: PyTree, *, at_zero: float = 0.0) -> jax.Array:
  """The cosine between two trees, as real vectors, in float32 at least.

  Leaves of `tree` that are :class:`optax.MaskedNode` are left out of both.
  Where one of the two is zero, it is `at_zero`.
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

"""The leaves of a tree by name, and the cosine of two trees."""

from typing import Any

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen

# A container that JAX flattens, or an array. Python has no type for it.
PyTree = Any


def joined_path(path: Any) -> str:
  """The names of a path, such as ``params/Dense_0/kernel``."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_by_path(tree: PyTree) -> list[tuple[str, Any]]:
  """Pairs of path and leaf. The path is for an error, and is never empty."""
  return [
    (jax.tree_util.keystr(path) or "the root", leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]


def cosine(tree: PyTree, other: PyTree, *, at_zero: float = 0.0) -> jax.Array:
  """The cosine between two trees as real vectors, in float32 at least.

  Leaves that are :class:`optax.MaskedNode` in `tree` do not count. Where one of
  the two trees is zero, the cosine is `at_zero`.
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
  # Selected, so that nothing is divided by zero.
  return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), at_zero)

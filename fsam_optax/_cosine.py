"""The cosine between two trees."""

from typing import Any

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen


def cosine(tree: Any, other: Any, *, at_zero: float = 0.0) -> jax.Array:
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

"""Means over the named axes of pmap, shard_map and vmap."""

import contextlib

import jax
from jax import numpy as jnp

from fsam_optax._perturbation import map_weights
from fsam_optax._trees import PyTree
from fsam_optax._versions import as_varying


def varying(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
  """Marks arrays as different on each replica, for `jax.shard_map`'s check.

  Without the mark, shard_map sums the gradient of replicated parameters over
  the axis, and no replica sees its own. Without the check, and under pmap and
  vmap, the mark changes nothing. Keys are not marked.
  """

  def mark(x):
    if jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended):
      return x
    x = jnp.asarray(x)
    for axis in manual:
      # An error for an array that varies already.
      with contextlib.suppress(ValueError):
        x = as_varying(x, axis)
    return x

  in_shard_map = jax.sharding.get_abstract_mesh().manual_axes
  manual = [axis for axis in axes if axis in in_shard_map]
  return jax.tree.map(mark, tree) if manual else tree


def mean(tree: PyTree, axes: tuple[str, ...]) -> PyTree:
  """Means over the replicas; keys come back unchanged.

  An integer or a bool must be the same on all replicas, as a counter is; the
  maximum is returned. The maximum is also returned for leaves that Flax
  overwrites (fp8).
  """
  if not axes:
    return tree

  def mean_of(x):
    dtype = jnp.result_type(x)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
      return x
    if jnp.issubdtype(dtype, jnp.inexact):
      return jax.lax.pmean(x, axes)
    is_bool = jnp.issubdtype(dtype, jnp.bool_)
    wide = jnp.asarray(x, jnp.int32 if is_bool else dtype)
    return jax.lax.pmax(wide, axes).astype(dtype)

  return map_weights(
    mean_of,
    varying(tree, axes),
    overwritten=lambda x: jax.lax.pmax(x, axes),
  )

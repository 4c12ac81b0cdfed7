"""Whether the arrays that come back from a disk are those that went there."""

import math
from typing import Any

import jax
from jax import numpy as jnp


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """One word for each array: of its bits, each by a weight of its place.

  Orbax does not notice every file that was cut or changed: it fills what is
  lost with zeros. A sum of integers does not depend on how an array is split
  over devices, and is taken where the array is, without moving it.

  Args:
    tree: of arrays and typed keys.

  Returns:
    Shape ``[number of arrays]``, uint32.
  """
  return jnp.stack([_checksum(x) for x in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  size = x.dtype.itemsize
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  places = jnp.arange(math.prod(words.shape), dtype=jnp.uint32)
  # Odd, and so invertible: a change of one word changes the sum.
  weights = 2 * places.reshape(words.shape) + 1
  return jnp.sum(words * weights, dtype=jnp.uint32)

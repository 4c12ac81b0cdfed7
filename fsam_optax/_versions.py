"""One name for what has other names in other versions of JAX and Flax."""

from typing import Any

from flax import nnx
import jax
from jax import core
import jax.extend.core

# Flax up to 0.12.6 has `pure`, and Flax 0.11.0 has `Object`.
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
Node = nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Object


def as_varying(x: jax.Array, axis: str) -> jax.Array:
  """Marks an array as different along an axis of `jax.shard_map`.

  Without the check of `jax.shard_map` it comes back unchanged. An array that
  has the mark already is a ValueError.
  """
  # In JAX up to 0.9 the mark sums the gradient also without the check.
  varies = getattr(jax.typeof(jax.lax.axis_index(axis)), "vma", None)
  if varies is not None and axis not in varies:
    return x
  lax: Any = jax.lax
  if hasattr(lax, "pcast"):
    return lax.pcast(x, axis, to="varying")
  return lax.pvary(x, axis)  # JAX up to 0.8.1.


def bound_axes() -> tuple[str, ...]:
  """The axes of every enclosing pmap, shard_map or vmap."""
  name = "unsafe_get_axis_names_DO_NOT_USE"
  # JAX up to 0.9 has it in the second place.
  names = getattr(jax.extend.core, name, None) or getattr(core, name, None)
  if names is None:
    # The name is private to JAX. Without it the axes of vmap are not found.
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
  return tuple(names())

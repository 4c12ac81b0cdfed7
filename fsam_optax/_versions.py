"""What the versions of JAX and Flax call differently, by one name each."""

from typing import Any

from flax import nnx
import jax
from jax import core
import jax.extend.core

# Flax up to 0.12.6 has the second name alone, and Flax 0.11.0 the fourth.
as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
Node = nnx.Pytree if hasattr(nnx, "Pytree") else nnx.Object


def as_varying(x: jax.Array, axis: str) -> jax.Array:
  """Marks an array as different along an axis of `jax.shard_map`.

  It comes back unchanged where nothing is checked. Where it has the mark
  already, that is a ValueError.
  """
  # JAX up to 0.9. Where nothing is checked there, the gradient behind the mark
  # would be summed over the axis all the same.
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
  # The second place is that of JAX up to 0.9.
  names = getattr(jax.extend.core, name, None) or getattr(core, name, None)
  if names is None:
    # Of no version's public interface: those of vmap are not seen without it.
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
  return tuple(names())

"""What the versions of JAX and Flax call differently, for the tests."""

from flax import nnx
import jax
import jax.experimental

# Flax up to 0.12.6; JAX 0.7.0; up to 0.7; up to 0.8.1.
as_pure = getattr(nnx, "as_pure", None) or nnx.pure
set_mesh = getattr(jax, "set_mesh", None) or jax.sharding.use_mesh
enable_x64 = getattr(jax, "enable_x64", None) or jax.experimental.enable_x64


def as_varying(x, axis):
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(x, axis, to="varying")
  return jax.lax.pvary(x, axis)

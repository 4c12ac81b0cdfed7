"""What the versions of JAX and Flax call differently, for the tests."""

from flax import nnx
import jax
import jax.experimental

as_pure = nnx.as_pure if hasattr(nnx, "as_pure") else nnx.pure
set_mesh = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh
enable_x64 = (
  jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
)

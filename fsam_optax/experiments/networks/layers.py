"""What the networks have in common: normalization, initialization."""

import functools
from typing import Any, Callable, Literal

from flax import linen as nn
import jax

Norm = Literal["none", "batch", "group"]

# Normal, the variance two over the inputs: He's, for the activations.
HE_FAN_IN = nn.initializers.he_normal()
# Normal, the variance two over the outputs: He's, for the gradients.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's own: uniform between plus and minus one over the root of the inputs.
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def batch_norm(train: bool, dtype: Any) -> Callable[[], nn.BatchNorm]:
  """Makes layers of BatchNorm with the constants of the authors' framework.

  Args:
    train: whether they take the statistics of the batch, and update the
      collection ``batch_stats``.
    dtype: of the computation; scales and statistics are float32.
  """
  return functools.partial(
    nn.BatchNorm,
    use_running_average=not train,
    momentum=0.9,
    epsilon=1e-5,
    dtype=dtype,
  )


def normalized(norm: Norm, x: jax.Array, train: bool, dtype: Any) -> jax.Array:
  """Units ``[B, ..., units]`` normalized by the batch, eight groups or not."""
  if norm == "batch":
    return batch_norm(train, dtype)()(x)
  if norm == "group":
    return nn.GroupNorm(num_groups=8, dtype=dtype)(x)
  return x

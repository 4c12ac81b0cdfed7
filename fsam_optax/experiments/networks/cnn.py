"""A small convolutional network that many seeds train at once."""

from typing import Any, Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks import layers


class CNN(nn.Module):
  """Convolutions of 3 x 3 and stride 2 with ReLU, then a linear layer.

  Attributes:
    classes: number of outputs.
    channels: output channels of each convolution.
    dtype: of the computation; None for that of inputs and parameters.
    norm: what stands between a layer and its ReLU.
  """

  classes: int
  channels: Sequence[int] = (16, 32)
  dtype: Any = None
  norm: layers.Norm = "none"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, classes]`."""
    for channels in self.channels:
      # A convolution as one matrix product over its patches, which vmap over
      # seeds keeps one; of nn.Conv it makes a grouped convolution.
      dense = nn.Dense(channels, kernel_init=layers.HE_FAN_IN, dtype=self.dtype)
      x = layers.normalized(self.norm, dense(_patches(x)), train, self.dtype)
      x = nn.relu(x)
    head = nn.Dense(self.classes, kernel_init=layers.HE_FAN_IN)
    return head(x.reshape(x.shape[0], -1))


def _patches(x: jax.Array) -> jax.Array:
  """The 3 x 3 neighborhood of every second pixel, both ways.

  From `[B, H, W, C]` to `[B, ceil(H / 2), ceil(W / 2), 9 C]`.
  """
  height, width = x.shape[1:3]
  padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  return jnp.concatenate(
    [
      padded[:, i : i + height : 2, j : j + width : 2]
      for i in range(3)
      for j in range(3)
    ],
    axis=-1,
  )


ENTRY = entry.Network(
  name="cnn",
  build=lambda classes, depth, width, dtype, **_: CNN(
    classes, tuple(width * 2**i for i in range(depth)), dtype
  ),
  depth=2,
  width=16,
)

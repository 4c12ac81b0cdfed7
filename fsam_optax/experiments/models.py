"""The models: a multilayer perceptron and a small convolutional network."""

from collections.abc import Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp


class MLP(nn.Module):
  """Fully connected layers with ReLU between, He initialisation.

  Attributes:
    classes: number of outputs.
    widths: units of each hidden layer.
  """

  classes: int
  widths: Sequence[int] = (64, 64)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps inputs of shape `[B, ...]` to logits of shape `[B, classes]`."""
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = nn.relu(nn.Dense(width, kernel_init=_HE)(x))
    return nn.Dense(self.classes, kernel_init=_HE)(x)


class CNN(nn.Module):
  """Convolutions of 3 x 3 and stride 2 with ReLU, then a linear layer.

  Attributes:
    classes: number of outputs.
    channels: output channels of each convolution.
  """

  classes: int
  channels: Sequence[int] = (16, 32)

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps images `[B, H, W]` or `[B, H, W, C]` to logits `[B, classes]`."""
    if x.ndim == 3:
      x = x[..., None]
    for channels in self.channels:
      # A convolution as one matrix product over its patches, which vmap over
      # seeds keeps one; of nn.Conv it makes a grouped convolution.
      x = nn.relu(nn.Dense(channels, kernel_init=_HE)(_patches(x)))
    return nn.Dense(self.classes, kernel_init=_HE)(x.reshape(x.shape[0], -1))


_HE = nn.initializers.he_normal()


def _patches(x: jax.Array) -> jax.Array:
  """The 3 x 3 neighbourhood of every second pixel, both ways.

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


def create(name: str, classes: int) -> nn.Module:
  """Builds ``"mlp"`` or ``"cnn"`` for so many classes."""
  return {"mlp": MLP, "cnn": CNN}[name](classes=classes)

"""A multilayer perceptron."""

from typing import Any, Sequence

from flax import linen as nn
import jax

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks import layers


class MLP(nn.Module):
  """Fully connected layers with ReLU between, He initialization.

  Attributes:
    classes: number of outputs.
    widths: units of each hidden layer.
    dtype: of the computation; None for that of inputs and parameters.
    norm: what stands between a layer and its ReLU.
  """

  classes: int
  widths: Sequence[int] = (64, 64)
  dtype: Any = None
  norm: layers.Norm = "none"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps inputs of shape `[B, ...]` to logits of shape `[B, classes]`."""
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      x = nn.Dense(width, kernel_init=layers.HE_FAN_IN, dtype=self.dtype)(x)
      x = nn.relu(layers.normalized(self.norm, x, train, self.dtype))
    return nn.Dense(self.classes, kernel_init=layers.HE_FAN_IN)(x)


ENTRY = entry.Network(
  name="mlp",
  build=lambda classes, depth, width, dtype, **_: MLP(
    classes, (width,) * depth, dtype
  ),
  depth=2,
  width=64,
  takes_vectors=True,
)

"""A multilayer perceptron."""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks.layers import HE_FAN_IN


class MLP(nn.Module):
  """Fully connected layers with ReLU between, He initialization.

  Attributes:
    classes: number of outputs.
    widths: units of each hidden layer.
    dtype: of the computation; None for that of inputs and parameters.
  """

  classes: int
  widths: Sequence[int] = (64, 64)
  dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps inputs of shape `[B, ...]` to logits of shape `[B, classes]`.

    Args:
      x: the inputs.
      train: ignored: there is neither dropout nor BatchNorm.

    Returns:
      The logits.
    """
    del train
    x = x.reshape(x.shape[0], -1)
    for width in self.widths:
      dense = nn.Dense(width, kernel_init=HE_FAN_IN, dtype=self.dtype)
      x = nn.relu(dense(x))
    return nn.Dense(self.classes, kernel_init=HE_FAN_IN)(x)


ENTRY = entry.Network(
  name="mlp",
  build=lambda classes, depth, width, dtype, **_: MLP(
    classes, (width,) * depth, dtype
  ),
  depth=2,
  width=64,
  about="hidden layers, and units of each",
  takes_vectors=True,
)

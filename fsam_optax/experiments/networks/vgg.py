"""VGG networks with BatchNorm, for images of 32 x 32 pixels."""

import functools
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks import layers

# Convolutions of each stage, by depth.
STAGES = {
  11: (1, 1, 2, 2, 2),
  13: (2, 2, 2, 2, 2),
  16: (2, 2, 3, 3, 3),
  19: (2, 2, 4, 4, 4),
}


class VGG(nn.Module):
  """Stages of 3 x 3 convolutions with BatchNorm, pooling, three linear layers.

  The linear layers have dropout and as many units as the last stage has
  channels, in the form for CIFAR of `timgaripov/swa
  <https://github.com/timgaripov/swa>`_. With the defaults and 10 classes:
  VGG16-BN, 15,253,578 parameters.

  Attributes:
    classes: number of outputs.
    depth: 11, 13, 16 or 19.
    width: channels of the first stage, twice as many in the next, at most 8
      times.
    dropout: probability that a unit of a linear layer's input is dropped.
    dtype: of the computation; parameters and statistics are float32.

  References:
    Simonyan and Zisserman, `Very Deep Convolutional Networks for Large-Scale
    Image Recognition <https://arxiv.org/abs/1409.1556>`_, 2015
  """

  classes: int
  depth: int = 16
  width: int = 64
  dropout: float = 0.5
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, classes]`, float32.

    Five poolings halve the images: they have 32 x 32 pixels at least.
    """
    norm = layers.batch_norm(train, self.dtype)
    channels = self.width
    for stage, convolutions in enumerate(STAGES[self.depth]):
      channels = self.width * min(2**stage, 8)
      for _ in range(convolutions):
        x = nn.Conv(
          channels, (3, 3), dtype=self.dtype, kernel_init=layers.HE_FAN_OUT
        )(x)
        x = nn.relu(norm()(x))
      x = nn.max_pool(x, (2, 2), (2, 2))
    x = x.mean((1, 2))  # One pixel, of 32 x 32.
    x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
    dense = functools.partial(
      nn.Dense, kernel_init=layers.TORCH, bias_init=nn.initializers.zeros
    )
    for _ in range(2):
      x = nn.Dropout(self.dropout, deterministic=not train)(x)
      x = nn.relu(dense(channels)(x))
    return dense(self.classes)(x)


ENTRY = entry.Network(
  name="vgg",
  build=VGG,
  depth=16,
  width=64,
  depth_rule=lambda depth: (
    None if depth in STAGES else f"one of {', '.join(map(str, STAGES))}"
  ),
  least_image=32,
  has_statistics=True,
)

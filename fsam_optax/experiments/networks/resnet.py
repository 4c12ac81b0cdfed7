"""ResNets for images of 32 x 32 pixels, as the paper trains them on CIFAR."""

import functools
from typing import Any, Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks import layers


class ResNet(nn.Module):
  """Residual blocks of two 3 x 3 convolutions, without a pooling stem.

  The stages after the first halve the resolution and double the channels. With
  the defaults and 10 classes: ResNet-18, 11,173,962 parameters. Kernels begin
  as in the authors' framework.

  Attributes:
    classes: number of outputs.
    width: channels of the first stage.
    blocks: number of blocks of each stage.
    dtype: of the computation; parameters and statistics are float32.

  References:
    He et al., `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_, 2016
  """

  classes: int
  width: int = 64
  blocks: Sequence[int] = (2, 2, 2, 2)
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, classes]`, float32."""
    conv = functools.partial(
      nn.Conv,
      use_bias=False,
      dtype=self.dtype,
      kernel_init=layers.TORCH,
      conv_general_dilated=layers.convolve,
    )
    norm = layers.batch_norm(train, self.dtype)
    x = nn.relu(norm()(conv(self.width, (3, 3))(x)))
    for stage, blocks in enumerate(self.blocks):
      channels = self.width * 2**stage
      for block in range(blocks):
        stride = 2 if stage > 0 and block == 0 else 1
        y = nn.relu(norm()(conv(channels, (3, 3), stride, padding=1)(x)))
        y = norm()(conv(channels, (3, 3))(y))
        if x.shape != y.shape:
          x = norm()(conv(channels, (1, 1), stride)(x))
        x = nn.relu(x + y)
    x = x.mean((1, 2)).astype(jnp.promote_types(self.dtype, jnp.float32))
    return nn.Dense(self.classes, kernel_init=layers.TORCH)(x)


ENTRY = entry.Network(
  name="resnet",
  build=lambda classes, depth, width, dtype, **_: ResNet(
    classes,
    width=width,
    blocks=((depth - 2) // 8,) * 4,
    dtype=dtype,
  ),
  depth=18,
  width=64,
  depth_rule=lambda depth: (
    "8 n + 2, such as 10 or 18," if depth < 10 or (depth - 2) % 8 else None
  ),
  has_statistics=True,
)

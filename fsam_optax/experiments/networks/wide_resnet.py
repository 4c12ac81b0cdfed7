"""Wide residual networks for images of 32 x 32 pixels."""

import functools
from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp

from fsam_optax.experiments.networks import entry
from fsam_optax.experiments.networks import layers


class WideResNet(nn.Module):
  """Residual units of normalization, ReLU and convolution, twice, in 3 stages.

  The second and third stage halve the resolution and double the channels. With
  the defaults and 10 classes: WRN-28-10, 36,479,194 parameters.

  The authors' script builds one unit more a stage than the depth says, 46.2
  million parameters: that network is ``depth=34`` here.

  Attributes:
    classes: number of outputs.
    depth: 6 n + 4 for n units a stage.
    width: the widening factor; the first stage has 16 times as many channels.
    dtype: of the computation; parameters and statistics are float32.

  References:
    Zagoruyko and Komodakis, `Wide Residual Networks
    <https://arxiv.org/abs/1605.07146>`_, 2016
  """

  classes: int
  depth: int = 28
  width: int = 10
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, classes]`, float32."""
    conv = functools.partial(
      nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=layers.HE_FAN_IN
    )
    norm = layers.batch_norm(train, self.dtype)
    x = conv(16, (3, 3))(x)
    for stage in range(3):
      channels = 16 * self.width * 2**stage
      for unit in range((self.depth - 4) // 6):
        stride = 2 if stage > 0 and unit == 0 else 1
        y = nn.relu(norm()(x))
        if unit == 0:  # The shortcut begins after the normalization.
          x = conv(channels, (1, 1), stride)(y)
        y = conv(channels, (3, 3), stride, padding=1)(y)
        y = conv(channels, (3, 3))(nn.relu(norm()(y)))
        x = x + y
    x = nn.relu(norm()(x)).mean((1, 2))
    x = x.astype(jnp.promote_types(self.dtype, jnp.float32))
    return nn.Dense(self.classes, kernel_init=nn.initializers.zeros)(x)


ENTRY = entry.Network(
  name="wide_resnet",
  build=lambda classes, depth, width, dtype, **_: WideResNet(
    classes, depth, width, dtype
  ),
  depth=28,
  width=10,
  depth_rule=lambda depth: (
    "6 n + 4, such as 10, 16 or 28," if depth < 10 or (depth - 4) % 6 else None
  ),
  has_statistics=True,
)

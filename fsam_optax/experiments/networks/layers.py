"""What the networks have in common: normalization, initialization."""

import functools
import itertools
import math
from typing import Any, Callable, Literal

from flax import linen as nn
import jax
from jax import lax
from jax import numpy as jnp

Norm = Literal["none", "batch", "group"]

# Normal, the variance two over the inputs: He's, for the activations.
HE_FAN_IN = nn.initializers.he_normal()
# Normal, the variance two over the outputs: He's, for the gradients.
HE_FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's own: uniform between plus and minus one over the root of the inputs.
TORCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def convolve(x, kernel, strides, padding, **options: Any) -> jax.Array:
  """A convolution; one to at most 2 x 2 pixels is a product of matrices.

  For those XLA's own takes many times as long on a CPU. It takes the place of
  :func:`jax.lax.conv_general_dilated` in Flax's layer, one group, no dilation.
  """
  inputs, window = x.shape[1:3], kernel.shape[:2]
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(inputs, window, strides, padding)
  offsets = [
    range(-pad[0], side + pad[1] - taps + 1, stride)
    for side, taps, stride, pad in zip(
      inputs, window, strides, padding, strict=True
    )
  ]
  outputs = [len(x) for x in offsets]
  if max(outputs) > 2 or not min(outputs):
    return lax.conv_general_dilated(x, kernel, strides, padding, **options)

  def seen(place):
    # What an output sees of all inputs: the kernel, cut off at the borders.
    sides = zip(place, inputs, window, strict=True)
    edges = [(at, side - taps - at, 0) for at, side, taps in sides]
    zero = jnp.zeros((), kernel.dtype)
    return lax.pad(kernel, zero, [*edges, (0, 0, 0), (0, 0, 0)])

  size = math.prod(x.shape[1:])
  matrices = [seen(place) for place in itertools.product(*offsets)]
  product = jnp.matmul(
    x.reshape(-1, size),
    jnp.stack(matrices, axis=3).reshape(size, -1),
    precision=options.get("precision"),
  )
  return product.reshape(len(x), *outputs, -1)


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

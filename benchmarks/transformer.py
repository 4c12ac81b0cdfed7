"""A small decoder-only transformer over tokens."""

from typing import Any

from flax import linen as nn
import jax
from jax import numpy as jnp


class Transformer(nn.Module):
  """Pre-norm blocks of causal attention and a feed-forward layer.

  With the defaults: 4,240,896 parameters.

  Attributes:
    vocabulary: number of tokens.
    length: longest sequence.
    width: of the embeddings.
    depth: number of blocks.
    heads: number of attention heads, a divisor of the width.
    dtype: of the computation; parameters are float32.
  """

  vocabulary: int = 4096
  length: int = 128
  width: int = 256
  depth: int = 4
  heads: int = 8
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens `[B, T]` to logits of the next `[B, T, vocabulary]`."""
    embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
    positions = self.param(
      "positions", nn.initializers.normal(0.02), (self.length, self.width)
    )
    x = embed(tokens) + positions[: tokens.shape[1]].astype(self.dtype)
    mask = nn.make_causal_mask(tokens)
    for _ in range(self.depth):
      attention = nn.SelfAttention(self.heads, dtype=self.dtype)
      x = x + attention(nn.LayerNorm(dtype=self.dtype)(x), mask)
      y = nn.Dense(4 * self.width, dtype=self.dtype)(
        nn.LayerNorm(dtype=self.dtype)(x)
      )
      x = x + nn.Dense(self.width, dtype=self.dtype)(nn.gelu(y))
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return embed.attend(x).astype(jnp.float32)

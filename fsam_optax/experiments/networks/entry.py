"""What a network declares: how it is built, and what it asks for."""

from typing import Any, Callable, NamedTuple, Optional

from flax import linen as nn
from jax import numpy as jnp


class Network(NamedTuple):
  """A network, as its file declares it.

  The module maps ``x`` of shape ``[B, H, W, C]`` to logits ``[B, classes]``,
  by ``apply(variables, x, train=False)``.

  Attributes:
    name: what commands call it.
    build: from ``classes, depth, width, dtype`` to the module; it may
      ignore what it has no use for.
    depth: by default.
    width: by default.
    depth_rule: from a depth to None, or to what it must be where it is not.
    least_image: side of the smallest image that it takes, in pixels.
    takes_vectors: whether it takes rows ``[B, features]``, too.
    has_statistics: whether it has a collection ``batch_stats``.
  """

  name: str
  build: Callable[..., nn.Module]
  depth: int
  width: int
  depth_rule: Callable[[int], Optional[str]] = lambda depth: None
  least_image: int = 1
  takes_vectors: bool = False
  has_statistics: bool = False

  def create(
    self,
    classes: int,
    *,
    depth: Optional[int] = None,
    width: Optional[int] = None,
    dtype: Any = jnp.float32,
  ) -> nn.Module:
    """Builds the module; parameters are float32, whatever it computes in."""
    return self.build(
      classes=classes,
      depth=depth or self.depth,
      width=width or self.width,
      dtype=dtype,
    )

  def check_rows(self, shape: tuple[int, ...]) -> Optional[str]:
    """What rows must be that are not of a shape for it, or None."""
    least, got = self.least_image, f"got rows of shape {list(shape)}"
    if len(shape) == 1 and not self.takes_vectors:
      return f"{self.name} must have images, {got}. Use mlp"
    if len(shape) == 3 and min(shape[:2]) < least:
      return f"{self.name} must have {least} x {least} pixels at least, {got}"
    return None

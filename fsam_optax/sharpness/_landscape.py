"""Slices of the loss: along a line, on a plane, and the directions for them."""

from collections.abc import Sequence
from typing import Any, Optional

import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

from fsam_optax._fsam import difference
from fsam_optax.sharpness._data_passes import LossFn
from fsam_optax.sharpness._data_passes import data_passes


def loss_along_line(
  loss_fn: LossFn,
  params: Any,
  direction: Any,
  data: Any,
  distances: Sequence[float],
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> np.ndarray:
  """The loss at ``params + distance * direction``.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    direction: in the tree of ``params``, such as a perturbation, the difference
      from another model, or :func:`filter_normalized_direction`.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    distances: in units of the direction, shape ``[K]``.
    batch_size: rows at a time, in memory; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    The losses, shape ``[K]``, float64; infinite or NaN where the loss is.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``, or a
      direction has other shapes than the parameters.
  """
  zero = jax.tree.map(jnp.zeros_like, direction)
  return loss_on_plane(
    loss_fn,
    params,
    (direction, zero),
    data,
    distances,
    [0.0],
    batch_size=batch_size,
    progress=progress,
  )[0]


def loss_on_plane(
  loss_fn: LossFn,
  params: Any,
  directions: tuple[Any, Any],
  data: Any,
  x: Sequence[float],
  y: Sequence[float],
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> np.ndarray:
  """The loss at ``params + x * directions[0] + y * directions[1]``.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    directions: two, in the tree of ``params``.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    x: multiples of the first direction, shape ``[K]``.
    y: multiples of the second, shape ``[J]``.
    batch_size: rows at a time, in memory; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    The losses, shape ``[J, K]``, float64; infinite or NaN where the loss is.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``, or a
      direction has other shapes than the parameters.

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """
  for direction in directions:
    if differing := difference(params, direction, dtypes=False):
      raise ValueError(
        f"A direction must hold the arrays of `params`, with {differing}. Make "
        "it from them, as `jax.tree.map` and `filter_normalized_direction` do."
      )
  points = len(x) * len(y)
  with data_passes(
    loss_fn, data, batch_size, "loss on a plane", progress, points
  ) as passes:
    return np.array(
      [[passes.loss(_move(params, directions, a, b)) for a in x] for b in y],
      np.float64,
    )


def filter_normalized_direction(key: jax.Array, params: Any) -> Any:
  """A random direction, each filter with the norm of the weights' filter.

  With scale-invariant layers, plain directions of two models cannot be
  compared. A filter holds the weights of one output, along the last axis of a
  Flax kernel. The direction is zero in arrays of fewer than two axes (biases,
  norms).

  Args:
    key: a key of :func:`jax.random.key`.
    params: the parameters.

  Returns:
    The direction, in the tree, shapes and dtypes of ``params``.

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """

  def scale(draw, weights):
    if weights.ndim < 2:
      return jnp.zeros_like(weights)
    axes = tuple(range(weights.ndim - 1))
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.abs(x) ** 2, axes, keepdims=True))
    return draw * norm(weights) / jnp.maximum(norm(draw), 1e-12)

  draws = optax.tree.random_like(key, params, jax.random.normal)
  return jax.tree.map(scale, draws, params)


@jax.jit
def _move(params, directions, a, b):
  return jax.tree.map(
    lambda w, u, v: (w + a * u + b * v).astype(w.dtype), params, *directions
  )

"""The loss and its gradient over a whole data set, a batch at a time."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import math
from typing import Any, NamedTuple, Optional

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax._loss import check_loss
from fsam_optax._options import check_int
from fsam_optax._perturbation import widen
from fsam_optax._trees import leaves_by_path
from fsam_optax.sharpness._progress import Tick
from fsam_optax.sharpness._progress import progress_bar

LossFn = Callable[[Any, Any], Any]


def mean_loss(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> float:
  """The loss over a whole data set.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    batch_size: rows at a time, in memory; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    The mean over the rows. It may be infinite or NaN.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.
  """
  with data_passes(loss_fn, data, batch_size, "loss", progress) as passes:
    return passes.loss(params)


def full_gradient(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> tuple[float, Any]:
  """The loss and its gradient over a whole data set.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    batch_size: rows at a time, in memory; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    The mean loss, and the gradient of :func:`jax.grad` in the tree and shapes
    of ``params``, in float32 at least.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.
  """
  with data_passes(loss_fn, data, batch_size, "gradient", progress) as passes:
    return passes.gradient(params)


class DataPasses(NamedTuple):
  """Losses and gradients over one data set.

  Attributes:
    loss_fn: returns the mean over the rows of a batch.
    data: a tree of arrays with the same number of rows.
    batch_size: rows at a time.
    tick: called after each batch.
  """

  loss_fn: LossFn
  data: Any
  batch_size: int
  tick: Tick

  def loss(self, params: Any) -> float:
    """The mean loss at some parameters."""
    return float(self._mean(loss_of, params))

  def gradient(self, params: Any) -> tuple[float, Any]:
    """The mean loss and its gradient at some parameters."""
    loss, gradient = self._mean(loss_and_gradient, params)
    return float(loss), gradient

  def _mean(self, fn: Callable[..., Any], params: Any) -> Any:
    """The mean over all rows of what ``fn`` returns for a batch."""
    rows, total = num_rows(self.data), None
    for start in range(0, rows, self.batch_size):
      stop = min(start + self.batch_size, rows)
      batch = jax.tree.map(lambda x, at=slice(start, stop): x[at], self.data)
      values = fn(self.loss_fn, params, batch)
      total = _add_scaled(total, values, (stop - start) / rows)
      # Without waiting, all batches would queue up on the device.
      jax.block_until_ready(total)
      self.tick()
    return total


@contextlib.contextmanager
def data_passes(
  loss_fn: LossFn,
  data: Any,
  batch_size: Optional[int],
  title: str,
  progress: bool,
  num_passes: int = 1,
) -> Iterator[DataPasses]:
  """Yields the passes; so many of them are the length of the progress bar."""
  size = rows_at_a_time("batch_size", batch_size, data)
  total = num_passes * math.ceil(num_rows(data) / size)
  with progress_bar(progress, title, total) as tick:
    yield DataPasses(loss_fn, data, size, tick)


def num_rows(data: Any) -> int:
  """The length that all arrays have along their first axis, 1 at least."""
  lengths = {
    path: np.shape(x)[0] if np.ndim(x) else None
    for path, x in leaves_by_path(data)
  }
  rows = set(lengths.values())
  if len(rows) != 1 or rows & {None, 0}:
    raise ValueError(
      "`data` must hold arrays of one number of rows, and one row at least, "
      f"got {lengths}. Close over arrays without rows."
    )
  return next(iter(lengths.values())) or 0


def rows_at_a_time(name: str, size: Optional[int], data: Any) -> int:
  """The checked value of the argument `name`; None is for all rows."""
  rows = num_rows(data)
  if size is None:
    return rows
  check_int(name, size, least=1)
  if size > rows:
    raise ValueError(
      f"`{name}` must be at most the number of rows of `data`, {rows}, "
      f"got {size}. Give more rows, or leave it out."
    )
  return size


def traced_mean_over_batches(
  fn: Callable[[Any], Any], data: Any, batch_size: int
) -> Any:
  """The mean over all rows of what `fn` returns for a batch, to be compiled.

  The last batch may have fewer rows.
  """
  rows = num_rows(data)
  whole = rows // batch_size
  parts = jax.tree.map(
    lambda x: jnp.reshape(
      x[: whole * batch_size], (whole, batch_size, *jnp.shape(x)[1:])
    ),
    data,
  )
  at = lambda i: jax.tree.map(lambda x: x[i], parts)
  if whole == 1:
    total = jax.tree.map(widen, fn(at(0)))
  else:

    def body(total, part):
      return jax.tree.map(jnp.add, total, fn(part)), None

    # In float32 at least: a narrow sum would stop growing.
    shapes = jax.eval_shape(lambda: jax.tree.map(widen, fn(at(0))))
    zero = lambda x: jnp.zeros(x.shape, x.dtype, out_sharding=x.sharding)
    total, _ = jax.lax.scan(body, jax.tree.map(zero, shapes), parts)
  total = jax.tree.map(lambda x: x * (batch_size / rows), total)
  if left := rows - whole * batch_size:
    rest = fn(jax.tree.map(lambda x: x[whole * batch_size :], data))
    total = jax.tree.map(lambda t, x: t + x * (left / rows), total, rest)
  return total


@jax.jit
def _add_scaled(total: Any, values: Any, fraction: jax.Array) -> Any:
  scaled = jax.tree.map(lambda x: widen(x) * fraction, values)
  return scaled if total is None else jax.tree.map(jnp.add, total, scaled)


@functools.partial(jax.jit, static_argnums=0)
def loss_of(loss_fn: Callable[..., Any], params: Any, batch: Any) -> jax.Array:
  """The loss of a batch, checked to be a scalar."""
  loss = loss_fn(params, batch)
  check_loss(loss)
  return jnp.asarray(loss)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(
  loss_fn: Callable[..., Any], params: Any, batch: Any
) -> tuple[jax.Array, Any]:
  """The loss of a batch and its gradient."""
  return jax.value_and_grad(lambda p: loss_of(loss_fn, p, batch))(params)

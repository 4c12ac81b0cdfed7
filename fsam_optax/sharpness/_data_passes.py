"""Passes over a whole data set, a batch at a time."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import functools
import math
from typing import Any, Optional

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax._batch import path_name
from fsam_optax._loss import check_loss

Tick = Callable[[], object]


def num_rows(data: Any) -> int:
  """Rows of a data set.

  Args:
    data: a tree of arrays with the same number of rows.

  Returns:
    The length of their leading axis.

  Raises:
    ValueError: if there are no rows, or the arrays differ.
  """
  lengths = {
    path_name(path): np.shape(x)[0] if np.ndim(x) else None
    for path, x in jax.tree_util.tree_leaves_with_path(data)
  }
  found = set(lengths.values())
  if len(found) != 1 or found & {None, 0}:
    raise ValueError(
      "`data` must hold arrays of one number of rows, and one row at least, "
      f"got {lengths}. Close over what is not per row."
    )
  return next(iter(lengths.values())) or 0


def batch_rows(size_name: str, size: Optional[int], rows: int) -> int:
  """The rows of a batch, or all of them for None.

  Args:
    size_name: what the argument is called, for the error.
    size: a positive number of rows, or None.
    rows: of the data set.

  Returns:
    The number of rows.

  Raises:
    TypeError: if it is not an int.
    ValueError: if it is not positive, or more than there are.
  """
  if size is None:
    return rows
  if isinstance(size, bool) or not isinstance(size, int):
    raise TypeError(f"`{size_name}` must be an int or None, got {size!r}.")
  if size < 1:
    raise ValueError(f"`{size_name}` must be at least 1, got {size}.")
  if size > rows:
    raise ValueError(
      f"`{size_name}` must be at most the number of rows of `data`, {rows}, "
      f"got {size}. Hand over more rows, or leave it out."
    )
  return size


def mean_over_batches(
  fn: Callable[[Any], Any], data: Any, batch_size: int, tick: Tick
) -> Any:
  """The mean over the rows of what `fn(batch)` returns as a mean over its own.

  Args:
    fn: a compiled function of a batch. The last batch may have fewer rows.
    data: a tree of arrays with the same number of rows.
    batch_size: rows of a batch.
    tick: called after each batch.

  Returns:
    The mean, in the tree that ``fn`` returns.
  """
  rows = num_rows(data)
  total = None
  for start in range(0, rows, batch_size):
    stop = min(start + batch_size, rows)
    batch = jax.tree.map(lambda x, at=slice(start, stop): x[at], data)
    share = (stop - start) / rows
    total = _add(total, fn(batch), share)
    jax.block_until_ready(total)
    tick()
  return total


def traced_mean(fn: Callable[[Any], Any], data: Any, batch_size: int) -> Any:
  """As :func:`mean_over_batches`, inside a compiled function."""
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
    total = fn(at(0))
  else:

    def body(total, part):
      return jax.tree.map(jnp.add, total, fn(part)), None

    shapes = jax.eval_shape(fn, at(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(body, zeros, parts)
  total = jax.tree.map(lambda x: x * (batch_size / rows), total)
  left = rows - whole * batch_size
  if left:
    rest = fn(jax.tree.map(lambda x: x[whole * batch_size :], data))
    total = jax.tree.map(lambda t, x: t + x * (left / rows), total, rest)
  return total


def num_batches(rows: int, batch_size: int) -> int:
  """Batches of a pass, the last of which may have fewer rows."""
  return math.ceil(rows / batch_size)


@jax.jit
def _add(total: Any, values: Any, share: jax.Array) -> Any:
  scaled = jax.tree.map(lambda x: x * share.astype(x.dtype), values)
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

  def checked(params):
    loss = loss_fn(params, batch)
    check_loss(loss)
    return loss

  return jax.value_and_grad(checked)(params)


@contextlib.contextmanager
def progress_bar(is_shown: bool, title: str, total: int) -> Iterator[Tick]:
  """A bar of `total` steps, or nothing.

  Args:
    is_shown: whether to show it.
    title: what stands before it.
    total: number of steps.

  Yields:
    The function that moves it by one.

  Raises:
    ImportError: if it is to be shown and rich is not installed.
  """
  if not is_shown:
    yield lambda: None
    return
  try:
    from rich import progress as rich_progress
  except ImportError as error:
    raise ImportError(
      "`progress=True` needs rich. Run: pip install 'fsam-optax[sharpness]'"
    ) from error

  with rich_progress.Progress(
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeRemainingColumn(),
  ) as bars:
    task = bars.add_task(title, total=total)
    yield lambda: bars.advance(task)

"""The rows of a batch: micro-batches, and those that the ascent sees."""

import math
from typing import Any, Callable

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax._tracing import is_staged
from fsam_optax._tree_paths import leaves_by_path


def mean_over_parts(
  fn: Callable[[Any, Any, Any], tuple[Any, Any]],
  batch: Any,
  num_parts: int,
  carry: Any,
  mark: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[Any, Any]:
  """Means of what `fn(part, index, carry)` returns, and the last carry.

  Args:
    fn: returns ``(outputs, carry)`` for the part of the batch at ``index``.
    batch: a tree of arrays with the same number of rows, a multiple of
      ``num_parts``.
    num_parts: number of parts, taken one at a time.
    carry: what the first part gets.
    mark: applied to whatever passes from part to part, see
      :func:`fsam_optax._axes.varying`.

  Returns:
    The means in the dtypes of the outputs, and the carry of the last part.
  """
  if num_parts == 1:
    return fn(batch, 0, carry)

  def part_at(index):
    # Row i goes to part i modulo the number of parts, so that a batch whose
    # rows lie on many devices splits without moving a row.
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(
        jnp.reshape(x, (-1, num_parts, *jnp.shape(x)[1:])),
        index,
        axis=1,
        keepdims=False,
      ),
      batch,
    )

  carry = mark(carry)
  # A metric may be a Python number.
  wide = lambda x: jnp.asarray(x, jnp.result_type(x, jnp.float32))
  add = lambda total, x: total + jnp.asarray(x, total.dtype)
  if is_staged():
    first = jax.eval_shape(part_at, jnp.zeros([], jnp.int32))
    shapes, _ = jax.eval_shape(fn, first, jnp.zeros([], jnp.int32), carry)

    def body(state, index):
      totals, carry = state
      outputs, carry = fn(part_at(index), index, carry)
      return mark((jax.tree.map(add, totals, outputs), carry)), None

    # Over a mesh of explicit axes the sharding is a part of an array's type.
    zeros = jax.tree.map(
      lambda x: jnp.zeros(
        x.shape,
        jnp.result_type(x.dtype, jnp.float32),
        out_sharding=x.sharding,
      ),
      shapes,
    )
    (totals, carry), _ = jax.lax.scan(
      body, (mark(zeros), carry), jnp.arange(num_parts, dtype=jnp.int32)
    )
  else:
    totals = shapes = None
    for index in jnp.arange(num_parts, dtype=jnp.int32):
      shapes, carry = fn(part_at(index), index, carry)
      totals = (
        jax.tree.map(wide, shapes)
        if totals is None
        else jax.tree.map(add, totals, shapes)
      )
  means = jax.tree.map(
    lambda t, x: (t / num_parts).astype(jnp.result_type(x)), totals, shapes
  )
  return means, carry


def fraction_of_rows(batch: Any, fraction: float) -> Any:
  """The fraction of the rows that the ascent sees.

  Of every ``q`` rows the first ``p``, where ``p / q`` is the fraction in lowest
  terms, so that a batch whose rows lie on many devices gives up as many of each
  without moving one.

  Args:
    batch: a tree of arrays with the same number of rows, of which the fraction
      is a whole number.
    fraction: in ``(0, 1]``.

  Returns:
    The tree with ``fraction`` times the rows.
  """
  if fraction == 1:
    return batch

  def take(x):
    rows = jnp.shape(x)[0]
    taken = round(fraction * rows)
    block = rows // math.gcd(taken, rows)
    blocks = jnp.reshape(x, (-1, block, *jnp.shape(x)[1:]))
    taken_rows = blocks[:, : taken * block // rows]
    return jnp.reshape(taken_rows, (taken, *jnp.shape(x)[1:]))

  return jax.tree.map(take, batch)


def check_batch(
  batch: Any, num_microbatches: int, ascent_fraction: float
) -> None:
  """Raises for a batch without rows, or one that does not split evenly.

  Args:
    batch: a tree of arrays.
    num_microbatches: number of parts.
    ascent_fraction: fraction of each part's rows.

  Raises:
    ValueError: if no array has rows, or a part or its fraction is not a whole
      number of rows.
  """
  lengths = {
    path: np.shape(x)[0] if np.ndim(x) else None
    for path, x in leaves_by_path(batch)
  }
  # One empty array says nothing: a graph may have no edges.
  if lengths and set(lengths.values()) == {0}:
    raise ValueError(
      f"`batch` must not be empty, got no rows at {', '.join(lengths)}."
    )
  if num_microbatches == 1 and ascent_fraction == 1:
    return
  if None in lengths.values() or len(set(lengths.values())) != 1:
    raise ValueError(
      "`batch` must hold arrays of one number of rows to be split into "
      f"micro-batches or by `ascent_fraction`, got {lengths}. Close over what "
      "is not per row."
    )
  length = next(filter(None, lengths.values()))
  if length % num_microbatches:
    raise ValueError(
      f"`num_microbatches` must divide the number of rows of the batch, got "
      f"{num_microbatches} for {length} rows, {length % num_microbatches} too "
      "many."
    )
  rows = length // num_microbatches
  taken = round(ascent_fraction * rows)
  if taken < 1 or abs(taken - ascent_fraction * rows) > 1e-6 * rows:
    low = math.floor(ascent_fraction * rows)
    nearest = " and ".join(
      f"{k}/{rows}" for k in (low, low + 1) if 1 <= k <= rows
    )
    what = "each micro-batch" if num_microbatches > 1 else "the batch"
    raise ValueError(
      f"`ascent_fraction` must be a whole number of rows of {what}, got "
      f"{ascent_fraction:g} of {rows} rows, {ascent_fraction * rows:g}. The "
      f"nearest are {nearest}."
    )

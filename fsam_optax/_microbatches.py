"""The rows of a batch: micro-batches, and the rows of the ascent."""

import math
from typing import Any, Callable

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
import numpy as np

from fsam_optax._perturbation import map_weights
from fsam_optax._perturbation import wide_dtype
from fsam_optax._perturbation import widen
from fsam_optax._tracing import is_staged
from fsam_optax._trees import PyTree
from fsam_optax._trees import leaves_by_path


def mean_over_parts(
  fn: Callable[[PyTree, ArrayLike, PyTree], tuple[PyTree, PyTree]],
  batch: PyTree,
  num_parts: int,
  carry: PyTree,
  mark: Callable[[PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
  """Means over the parts, in the dtypes of the outputs, and the last carry.

  For each part, one at a time, ``fn(part, index, carry)`` returns ``(outputs,
  carry)``. Leaves that Flax overwrites (fp8) get the maximum, not the mean.
  `mark` is :func:`fsam_optax._axes.varying`, for the carry and the sums.
  """
  if num_parts == 1:
    return fn(batch, 0, carry)

  def run(carry, index):
    return fn(_part_of(batch, num_parts, index), index, carry)

  if is_staged():
    totals, outputs, carry = _scanned(run, num_parts, mark(carry), mark)
  else:
    totals, outputs, carry = _looped(run, num_parts, mark(carry))
  means = map_weights(
    lambda total, x: (total / num_parts).astype(jnp.result_type(x)),
    totals,
    outputs,
    overwritten=lambda total, x: total.astype(jnp.result_type(x)),
  )
  return means, carry


def _part_of(batch, num_parts, index):
  """The rows i with i modulo the number of parts at `index`.

  A batch whose rows lie on many devices is split so without moving a row.
  """
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(
      jnp.reshape(x, (len(x) // num_parts, num_parts, *jnp.shape(x)[1:])),
      index,
      axis=1,
      keepdims=False,
    ),
    batch,
  )


def _scanned(run, num_parts, carry, mark):
  """Sums over the parts in one compiled loop, and the outputs of one part."""
  # Closed over, because a ShapeDtypeStruct argument has no sharding over the
  # axes of a mesh that are not manual.
  zero = jnp.zeros([], jnp.int32)
  outputs, _ = jax.eval_shape(lambda: run(carry, zero))
  # Over a mesh of explicit axes the sharding is a part of an array's type.
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, wide_dtype(x), out_sharding=x.sharding),
    outputs,
  )

  def step(state, index):
    totals, carry = state
    outputs, carry = run(carry, index)
    return mark((_added(totals, outputs, index), carry)), None

  indices = jnp.arange(num_parts, dtype=jnp.int32)
  (totals, carry), _ = jax.lax.scan(step, (mark(zeros), carry), indices)
  return totals, outputs, carry


def _looped(run, num_parts, carry):
  """The same in a Python loop, where nothing is compiled."""
  outputs, carry = run(carry, jnp.zeros([], jnp.int32))
  totals = jax.tree.map(widen, outputs)
  for index in jnp.arange(1, num_parts, dtype=jnp.int32):
    outputs, carry = run(carry, index)
    totals = _added(totals, outputs, index)
  return totals, outputs, carry


def _added(totals, outputs, index):
  """Sums; the maximum for leaves that Flax overwrites."""
  outputs = jax.tree.map(
    lambda total, x: jnp.asarray(x, total.dtype), totals, outputs
  )
  return map_weights(
    jnp.add,
    totals,
    outputs,
    overwritten=lambda total, x: jnp.where(
      index == 0, x, jnp.maximum(total, x)
    ),
  )


def fraction_of_rows(batch: PyTree, fraction: float) -> PyTree:
  """The rows of the ascent: of every ``q`` rows the first ``p``.

  Here ``p / q`` is the fraction in lowest terms. A batch whose rows lie on many
  devices, a multiple of ``q`` on each, gives as many of each and moves none.
  """

  def take(x):
    rows, *shape = jnp.shape(x)
    taken = round(fraction * rows)
    number = math.gcd(taken, rows)
    blocks = jnp.reshape(x, (number, rows // number, *shape))
    return jnp.reshape(blocks[:, : taken // number], (taken, *shape))

  return jax.tree.map(take, batch)


def check_batch(
  batch: PyTree, num_microbatches: int, ascent_fraction: float
) -> None:
  """Raises for a batch without rows, or one that does not split evenly."""
  lengths: dict[str, Any] = {
    path: np.shape(x)[0] if np.ndim(x) else None
    for path, x in leaves_by_path(batch)
  }
  # A single empty array is allowed: a graph may have no edges.
  if lengths and set(lengths.values()) == {0}:
    raise ValueError(
      f"`batch` must not be empty, got no rows at {', '.join(lengths)}."
    )
  if num_microbatches == 1 and ascent_fraction == 1:
    return
  dtype = getattr(batch, "dtype", np.dtype(object))
  # A key of `jax.random.PRNGKey` is an array without rows.
  is_key = dtype == jnp.uint32 and jnp.shape(batch) in ((2,), (4,))
  is_typed_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
  is_key |= is_typed_key and jnp.ndim(batch) == 0
  if None in lengths.values() or len(set(lengths.values())) != 1 or is_key:
    raise ValueError(
      "`batch` must hold arrays of one number of rows, to be split into "
      "micro-batches or by `ascent_fraction`, got "
      f"{'what may be a random key' if is_key else lengths or 'no array'}. It "
      "is the first argument after the perturbation's state, or after the "
      "model: put the rows there, and close over arrays without rows."
    )
  (length,) = set(lengths.values())
  if length % num_microbatches:
    raise ValueError(
      "`num_microbatches` must divide the number of rows of the batch, got "
      f"{num_microbatches} for {length} rows. Drop "
      f"{length % num_microbatches} of them, or add "
      f"{-length % num_microbatches}."
    )
  rows = length // num_microbatches
  taken = round(ascent_fraction * rows)
  most = rows if ascent_fraction == 1 else rows - 1
  is_whole = abs(taken - ascent_fraction * rows) <= 1e-6 * rows
  if not (is_whole and 1 <= taken <= most):
    low = math.floor(ascent_fraction * rows)
    nearest = " and ".join(
      f"{k}/{rows}" for k in (low, low + 1) if 1 <= k <= rows
    )
    what = "each micro-batch" if num_microbatches > 1 else "the batch"
    raise ValueError(
      f"`ascent_fraction` must be a whole number of rows of {what}, got "
      f"{ascent_fraction} of {rows} rows, {ascent_fraction * rows:g}. The "
      f"nearest are {nearest}."
    )

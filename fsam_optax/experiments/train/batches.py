"""The batches of a run: which rows, in which order, fetched ahead."""

import functools
from typing import Any, Iterator

import jax
import numpy as np

import fsam_optax

ORDER_STREAM = 0
_THREADS, _AHEAD = 2, 16


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
  rng = np.random.default_rng((seed, ORDER_STREAM, epoch))
  return rng.permutation(rows)


def rows_of(number: int, seed: int, rows: int, batch_size: int) -> np.ndarray:
  """The rows of a batch, by the seed and its number in the run alone.

  Each epoch has an order of its own, and leaves out rows that fill no batch.
  """
  epoch, position = divmod(number, rows // batch_size)
  start = position * batch_size
  return _order(seed, epoch, rows)[start : start + batch_size]


def rows_of_process(rows: int) -> slice:
  index, count = jax.process_index(), jax.process_count()
  return slice(index * rows // count, (index + 1) * rows // count)


def stream(
  x: np.ndarray,
  y: np.ndarray,
  mesh: jax.sharding.Mesh,
  *,
  seed: int,
  batch_size: int,
  start: int,
  stop: int,
) -> Iterator[dict[str, Any]]:
  """The batches from ``start`` to ``stop``, on the devices, fetched ahead."""
  import grain

  mine = rows_of_process(batch_size)

  def read(number):
    chosen = rows_of(number, seed, len(y), batch_size)
    return {"image": x[chosen[mine]], "label": y[chosen[mine]]}

  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
  source = grain.MapDataset.range(start, stop).map(read)
  feed = fsam_optax.sharding.BatchFeeder(mesh)
  return map(feed, source.to_iter_dataset(options))

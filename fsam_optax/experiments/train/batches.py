"""The batches of a run: which rows, in which order, fetched ahead."""

from collections.abc import Iterator
import time
from typing import Any

import jax
import numpy as np

import fsam_optax
from fsam_optax.experiments.common import extras

_THREADS, _AHEAD = 2, 16


class Order:
  """The rows of every batch, a function of the seed and its number alone.

  A resumed run therefore sees the batches that it would have seen.

  Attributes:
    steps_an_epoch: number of batches.
    last_size: rows of the last batch of an epoch, 0 where it is a whole one.
  """

  def __init__(
    self, rows: int, batch_size: int, *, drop_last: bool, seed: int
  ) -> None:
    """Counts the batches; an epoch is drawn when its first rows are asked for.

    Args:
      rows: number of training rows.
      batch_size: rows of a batch, of all devices together.
      drop_last: whether rows that fill no whole batch wait for another epoch.
      seed: of the permutations, a new one every epoch.
    """
    self._rows, self._batch_size, self._seed = rows, batch_size, seed
    self.last_size = 0 if drop_last else rows % batch_size
    self.steps_an_epoch = rows // batch_size + (self.last_size > 0)
    self._drawn: tuple[int, np.ndarray] = (-1, np.empty(0))

  def rows_of(self, number: int) -> np.ndarray:
    """The rows of a batch, counted from the first one of the run."""
    epoch, position = divmod(number, self.steps_an_epoch)
    known, order = self._drawn  # Once, as another thread may replace it.
    if known != epoch:
      rng = np.random.default_rng((self._seed, 0, epoch))
      order = rng.permutation(self._rows)
      self._drawn = (epoch, order)
    start = position * self._batch_size
    return order[start : start + self._batch_size]


def rows_of_process(rows: int) -> slice:
  """Which rows of a global batch are this process's."""
  index, count = jax.process_index(), jax.process_count()
  return slice(index * rows // count, (index + 1) * rows // count)


class _Source:
  """Batches by their number, as grain reads them. Each process's own rows."""

  def __init__(self, order, x, y, batches):
    self._order, self._x, self._y, self._batches = order, x, y, batches

  def __len__(self):
    return self._batches

  def __getitem__(self, index):
    rows = self._order.rows_of(int(index))
    rows = rows[rows_of_process(len(rows))]
    return {"image": self._x[rows], "label": self._y[rows]}


class Batches:
  """Fetches the batches ahead, on threads, and counts the time spent waiting.

  Attributes:
    waited: seconds for which :meth:`__next__` kept its caller, so far.
  """

  def __init__(
    self,
    order: Order,
    x: np.ndarray,
    y: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    start: int,
    stop: int,
  ) -> None:
    """Begins to fetch.

    Args:
      order: the rows of every batch.
      x: images, shape ``[N, H, W, C]``.
      y: labels, shape ``[N]``.
      mesh: the devices, along whose axis ``batch`` the rows are split.
      start: number of the first batch.
      stop: number of batches of the whole run.
    """
    extras.require("grain")
    import grain

    source = grain.MapDataset.source(_Source(order, x, y, stop))[start:]
    self._batches: Iterator[dict[str, np.ndarray]] = iter(
      source.to_iter_dataset(
        grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
      )
    )
    self._mesh = mesh
    self._feeders: dict[int, fsam_optax.sharding.BatchFeeder] = {}
    self.waited = 0.0

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, Any]:
    """The next batch, on the devices."""
    start = time.perf_counter()
    batch = next(self._batches)
    rows = len(batch["label"])
    # A feeder takes one shape, and the last batch of an epoch is smaller.
    if rows not in self._feeders:
      self._feeders[rows] = fsam_optax.sharding.BatchFeeder(self._mesh)
    placed = self._feeders[rows](batch)
    self.waited += time.perf_counter() - start
    return placed

"""The batches of a run: which rows, in which order, fetched ahead."""

from collections.abc import Iterator
import time
from typing import Any

import jax
import numpy as np

from fsam_optax._parallel import BatchFeeder
from fsam_optax.experiments import extras

_THREADS, _AHEAD = 2, 16


class Plan:
  """The rows of every batch, a function of the seed and its number alone.

  A resumed run therefore sees the batches that it would have seen.
  """

  def __init__(
    self, rows: int, batch_size: int, *, drop_last: bool, seed: int
  ) -> None:
    """Plans.

    Args:
      rows: of the training set.
      batch_size: of all devices together.
      drop_last: whether rows that fill no whole batch wait for another epoch.
      seed: of the order, a new one every epoch.
    """
    self._rows, self._batch_size, self._seed = rows, batch_size, seed
    self.last_size = 0 if drop_last else rows % batch_size
    self.steps_an_epoch = rows // batch_size + (self.last_size > 0)
    self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

  def rows_of(self, number: int) -> np.ndarray:
    """The rows of a batch, counted from the first one of the run."""
    epoch, position = divmod(number, self.steps_an_epoch)
    known, order = self._order  # Once, as another thread may replace it.
    if known != epoch:
      rng = np.random.default_rng((self._seed, 0, epoch))
      order = rng.permutation(self._rows)
      self._order = (epoch, order)
    start = position * self._batch_size
    return order[start : start + self._batch_size]


class _Source:
  """Batches by their number, as grain reads them. Each process's own rows."""

  def __init__(self, plan, x, y, batches):
    self._plan, self._x, self._y, self._batches = plan, x, y, batches

  def __len__(self):
    return self._batches

  def __getitem__(self, index):
    rows = self._plan.rows_of(int(index))
    mine = slice(
      jax.process_index() * len(rows) // jax.process_count(),
      (jax.process_index() + 1) * len(rows) // jax.process_count(),
    )
    rows = rows[mine]
    return {"image": self._x[rows], "label": self._y[rows]}


class Batches:
  """Fetches the batches ahead, on threads, and counts the time spent waiting.

  Attributes:
    waited: seconds for which :meth:`__next__` kept its caller, so far.
  """

  def __init__(
    self,
    plan: Plan,
    x: np.ndarray,
    y: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    start: int,
    stop: int,
  ) -> None:
    """Begins to fetch.

    Args:
      plan: the rows of every batch.
      x: images, shape ``[N, H, W, C]``.
      y: labels, shape ``[N]``.
      mesh: the devices, along whose axis ``batch`` the rows are split.
      start: number of the first batch.
      stop: number of batches of the whole run.
    """
    extras.require("grain")
    import grain

    source = grain.MapDataset.source(_Source(plan, x, y, stop))[start:]
    self._batches: Iterator[dict[str, np.ndarray]] = iter(
      source.to_iter_dataset(
        grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
      )
    )
    self._mesh = mesh
    self._feeders: dict[int, BatchFeeder] = {}
    self.waited = 0.0

  def __iter__(self) -> "Batches":
    return self

  def __next__(self) -> dict[str, Any]:
    """The next batch, on the devices."""
    start = time.perf_counter()
    batch = next(self._batches)
    rows = len(batch["label"])
    if rows not in self._feeders:  # The last one of an epoch is smaller.
      self._feeders[rows] = BatchFeeder(self._mesh)
    placed = self._feeders[rows](batch)
    self.waited += time.perf_counter() - start
    return placed

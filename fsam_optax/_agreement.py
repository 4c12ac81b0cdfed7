"""Whether the processes of a job agree on shapes and values.

Processes that compile different programs wait for each other forever, and ones
that start from different values train different models. Here both are an error
that names what differs.
"""

import hashlib
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
import numpy as np

from fsam_optax._tree_paths import leaves_by_path

_SHOWN_BYTES = 4096  # Of the shapes of a process, in an error.


class ShapeAgreement:
  """Whether all processes feed the same shapes, and go on with them."""

  def __init__(self):
    """Starts before the first batch."""
    self._shapes = None

  def check(self, batch: Any) -> bool:
    """Compares a batch with the first, and that with those of the others.

    Args:
      batch: a tree of arrays.

    Returns:
      Whether this was the first one.

    Raises:
      ValueError: if the shapes differ between processes or from the first.
    """
    shapes = {
      path: f"{jnp.result_type(x)}{list(np.shape(x))}"
      for path, x in leaves_by_path(batch)
    }
    if self._shapes is None:
      _check_same_shapes(shapes)
      self._shapes = shapes
      return True
    if shapes != self._shapes:
      raise ValueError(
        f"`batch` must have the shapes of the first one, {self._shapes}, got "
        f"{shapes}. Drop or pad the last rows of an epoch; use a feeder of its "
        "own for evaluation."
      )
    return False


def check_same_values(state: Any) -> None:
  """Raises unless a tree holds the same values in every process.

  Args:
    state: a tree of arrays. Those that are on devices of several processes
      already are left out.

  Raises:
    ValueError: names an array that differs, and the processes.
  """
  digests = {}
  for path, x in leaves_by_path(state):
    if isinstance(x, jax.Array):
      if not x.is_fully_addressable:
        continue
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    digests[path] = _digest(f"{x.dtype}{x.shape}".encode() + x.tobytes())
  # The exchange is a collective, which needs one size in every process: trees
  # of different structure are found out by one digest of their paths.
  paths = _digest(str(list(digests)).encode())
  if different := _processes_that_differ(paths):
    raise ValueError(
      "`state` must have the same structure in every process: that of "
      f"{different} differs from that of process 0."
    )
  if not digests or not _processes_that_differ(
    _digest(b"".join(x.tobytes() for x in digests.values()))
  ):
    return
  gathered = _gather(np.stack(list(digests.values())))
  for i, path in enumerate(digests):
    different = _enumerate((gathered[:, i] != gathered[0, i]).any(axis=1))
    if different:
      raise ValueError(
        "`state` must hold the same values in every process: that of "
        f"{different} differs from that of process 0 at {path}. Create it with "
        "the same seed everywhere, or restore the same checkpoint."
      )


def _check_same_shapes(shapes):
  if jax.process_count() == 1:
    return
  text = str(shapes).encode()
  buffer = np.zeros(_SHOWN_BYTES, np.uint8)
  shown = np.frombuffer(text[:_SHOWN_BYTES], np.uint8)
  buffer[: len(shown)] = shown
  gathered = _gather(np.concatenate([buffer, _digest(text)]))
  if (gathered != gathered[0]).any():
    got = "; ".join(
      f"process {i}: {bytes(row[row != 0]).decode(errors='replace')}"
      for i, row in enumerate(gathered[:, :_SHOWN_BYTES])
    )
    raise ValueError(
      "`batch` must have the same shapes in every process, got "
      f"{got}. Give every process as many rows."
    )


def _digest(data: bytes) -> np.ndarray:
  return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def _gather(x: np.ndarray) -> np.ndarray:
  """The array of every process, with an axis over them in front."""
  return np.asarray(multihost_utils.process_allgather(x))


def _processes_that_differ(digest: np.ndarray) -> str:
  """The processes whose digest differs from that of process 0, or nothing."""
  gathered = _gather(digest)
  return _enumerate((gathered != gathered[0]).any(axis=1))


def _enumerate(is_listed: np.ndarray) -> str:
  """The processes at True, such as ``processes 1, 3``, or nothing."""
  numbers = np.flatnonzero(is_listed).tolist()
  plural = "processes" if len(numbers) > 1 else "process"
  return f"{plural} {', '.join(map(str, numbers))}" if numbers else ""

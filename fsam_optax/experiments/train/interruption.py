"""The signals that tell a run to end, and how it hears them."""

import os
import signal
import sys
import threading
from typing import Any, Optional

import jax
from jax.experimental import multihost_utils

_STATUS: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}


class Interrupted(Exception):
  """A run that was told to end, and has saved.

  Attributes:
    status: what the process should end with.
  """

  def __init__(self, message: str, status: int) -> None:
    super().__init__(message)
    self.status = status


class Interruption:
  """Takes note of SIGTERM and SIGINT, for a run to save and end.

  With several processes JAX takes note of SIGTERM, and tells all of them of the
  step to end at.
  """

  def __init__(self) -> None:
    """Nothing is installed before the context is entered."""
    self._signal: Optional[int] = None
    self._is_saved = True
    self._before: dict[int, Any] = {}

  def __enter__(self) -> "Interruption":
    if jax.process_count() == 1 and (
      threading.current_thread() is threading.main_thread()
    ):
      for number in _STATUS:
        self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def begin(self) -> None:
    """From now on there is something to save."""
    self._is_saved = False

  def status(self, batches: int) -> Optional[int]:
    """What to end with, or None to go on.

    Args:
      batches: the number taken, the same in every process.

    Returns:
      0 after SIGTERM, 130 after SIGINT, or None.
    """
    if jax.process_count() > 1:
      # Every process must end after the same batch, or the others would wait
      # for its part of a sum: JAX agrees on one among them.
      return (
        0 if multihost_utils.reached_preemption_sync_point(batches) else None
      )
    return None if self._signal is None else _STATUS[self._signal]

  def _note(self, number, frame) -> None:
    del frame
    message = None
    if self._is_saved:
      message = "told to end; no step was taken since"
    elif self._signal == number == signal.SIGINT:
      message = "told to end twice; what was not saved is lost"
    if message:
      # Not by an exception: the compiler may be at work on another thread.
      print(message, file=sys.stderr, flush=True)
      os._exit(_STATUS[number])
    self._signal = self._signal or number

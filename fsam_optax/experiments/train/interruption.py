"""The signals that tell a run to end, and how it hears them."""

import os
import signal
import sys
import threading
from typing import Any, Optional

import jax
from jax.experimental import multihost_utils

_STATUS: dict[int, int] = {
  signal.SIGTERM: 0,
  signal.SIGINT: 130,
  signal.SIGHUP: 129,
}


class Interrupted(Exception):
  """A run that was told to end, and has saved.

  Attributes:
    status: what the process should end with.
  """

  def __init__(self, message: str, status: int) -> None:
    super().__init__(message)
    self.status = status


class Interruption:
  """Takes note of SIGTERM, SIGINT and SIGHUP, for a run to save and end.

  With several processes JAX takes note of SIGTERM, and tells all of them of the
  step to end at. The other two become that one.
  """

  def __init__(self) -> None:
    """Nothing is installed before the context is entered."""
    self._signal: Optional[int] = None
    self._is_saved = True
    self._before: dict[int, Any] = {}
    self._steps = 0

  def __enter__(self) -> "Interruption":
    if threading.current_thread() is not threading.main_thread():
      return self
    is_job = jax.process_count() > 1
    for number in _STATUS:
      if number == signal.SIGTERM and is_job:
        continue  # It is JAX's.
      if signal.getsignal(number) == signal.SIG_IGN:
        continue  # As under nohup.
      self._before[number] = signal.signal(
        number, self._note_in_job if is_job else self._note
      )
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def begin(self) -> None:
    """From now on there is something to save."""
    self._is_saved = False

  def status(self) -> Optional[int]:
    """What to end with, or None to go on; to be asked once after each batch.

    Returns:
      0 after SIGTERM, 130 after SIGINT, 129 after SIGHUP, or None.
    """
    if jax.process_count() > 1:
      # Every process must end after the same batch, or the others would wait
      # for its part of a sum: JAX agrees on one among them, by a count that
      # must never go back, as that of a seed's batches does at the next seed.
      self._steps += 1
      if not multihost_utils.reached_preemption_sync_point(self._steps):
        return None
      return 0 if self._signal is None else _STATUS[self._signal]
    return None if self._signal is None else _STATUS[self._signal]

  def _note_in_job(self, number, frame) -> None:
    del frame
    self._signal = self._signal or number
    os.kill(os.getpid(), signal.SIGTERM)

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

"""The signals that tell a run to end, and how it hears them."""

import os
import signal
from typing import Any, Optional

import jax
from jax.experimental import multihost_utils

STATUS: dict[int, int] = {
  signal.SIGTERM: 0,
  signal.SIGINT: 130,
  signal.SIGHUP: 129,
}


class Interrupted(Exception):
  """A run that was told to end, and has saved: what to say, and the status."""


class Interruption:
  """Takes note of SIGTERM, SIGINT and SIGHUP, for a run to save and end.

  Outside of the context they end the process as always. With several processes
  JAX takes note of SIGTERM, and tells all of them the step to end at; the other
  two signals become SIGTERM.
  """

  def __init__(self) -> None:
    self._signal: Optional[int] = None
    self._before: dict[int, Any] = {}
    self._steps = 0

  def __enter__(self) -> None:
    is_job = jax.process_count() > 1
    for number in STATUS:
      is_of_jax = is_job and number == signal.SIGTERM
      # Ignored is what comes under nohup.
      if not is_of_jax and signal.getsignal(number) != signal.SIG_IGN:
        self._before[number] = signal.signal(number, self._note)

  def __exit__(self, *exception: object) -> None:
    while self._before:
      signal.signal(*self._before.popitem())

  def status(self, *, has_failed: bool) -> Optional[int]:
    """The status to end with, or None to go on; asked once after each batch.

    A process that has failed ends as if it was told to, and the others with it.
    """
    if has_failed and self._signal is None:
      self._tell(signal.SIGTERM)
    if jax.process_count() == 1:
      return None if self._signal is None else STATUS[self._signal]
    # Every process must end after the same batch. JAX agrees on one, by a count
    # that must never go back, as a seed's batches do at the next seed.
    self._steps += 1
    if not multihost_utils.reached_preemption_sync_point(self._steps):
      return None
    return STATUS[self._signal or signal.SIGTERM]

  def _note(self, number, frame) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)  # A second one ends at once.
    self._tell(number)

  def _tell(self, number) -> None:
    self._signal = self._signal or number
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

"""Which batches ascend: ``--every``, ``--start`` and ``--stop``."""

import re
from typing import Optional

_FORM = re.compile(r"(\d{1,9})(epochs?)?")


class Gate:
  """Says, on the host, which of two compiled steps a batch goes through."""

  def __init__(
    self, every: int, start: str, stop: Optional[str], steps_an_epoch: int
  ) -> None:
    """Turns epochs into steps.

    Args:
      every: one batch in so many ascends.
      start: see :func:`steps_of`.
      stop: see :func:`steps_of`; None for never.
      steps_an_epoch: number of batches.
    """
    self._every = every
    self._start = steps_of(start, steps_an_epoch)
    self._stop = None if stop is None else steps_of(stop, steps_an_epoch)

  def __call__(self, number: int) -> bool:
    """Whether the batch of this number, counted from 0, ascends."""
    since = number - self._start
    is_over = self._stop is not None and number >= self._stop
    return since >= 0 and since % self._every == 0 and not is_over


def steps_of(text: str, steps_an_epoch: int) -> int:
  """The number of steps that a flag says.

  Examples:
    >>> steps_of("3000", 391), steps_of("10epochs", 391)
    (3000, 3910)

  Args:
    text: a whole number, of steps or, with ``epochs`` behind it, of epochs.
    steps_an_epoch: number of batches.

  Returns:
    The number.

  Raises:
    ValueError: if the text is of another form.
  """
  match = _FORM.fullmatch(text)
  if match is None:
    raise ValueError(
      "must be a number of steps such as 3000, or of epochs such as 10epochs, "
      f"got {text!r}"
    )
  return int(match[1]) * (steps_an_epoch if match[2] else 1)


def parse(text: str) -> str:
  """The text as it is, or the error of :func:`steps_of`."""
  steps_of(text, 1)
  return text

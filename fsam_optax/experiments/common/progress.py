"""Progress bars where stdout is a terminal, and nothing but lines elsewhere."""

import sys
import time
from typing import Any, Callable, Optional

Advance = Callable[..., None]
_SECONDS = 3.0  # Between two lines of what has no bar.


def lines(title: str, total: int) -> Callable[[], None]:
  """Says on stderr, every few seconds, how far something has come.

  What is done sooner says nothing. It stands above or below the bars of others,
  and in the log of a job.

  Args:
    title: what is done.
    total: number of steps.

  Returns:
    A function to call after each step.
  """
  done, said = 0, time.monotonic()

  def advance() -> None:
    nonlocal done, said
    done += 1
    if time.monotonic() - said >= _SECONDS:
      said = time.monotonic()
      print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)

  return advance


class Bars:
  """Shows a bar for each task; a context, in which the bars are alive."""

  def __init__(self) -> None:
    """Nothing is shown before the context is entered."""
    self._bars: Any = None
    if sys.stdout.isatty():
      self._bars = _rich_bars()

  def __enter__(self) -> "Bars":
    if self._bars is not None:
      self._bars.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bars is not None:
      self._bars.stop()

  def start(
    self,
    title: str,
    total: int,
    *,
    done: int = 0,
    rate: Optional[Callable[[float], str]] = None,
  ) -> Advance:
    """Opens a bar.

    Args:
      title: what it is of.
      total: number of steps.
      done: steps that were taken before.
      rate: from steps a second to what is shown of them; None for nothing.

    Returns:
      ``advance(steps=1, text="")``: moves the bar, and shows a text beside it.
    """
    bars = self._bars
    if bars is None:
      return lambda steps=1, text="": None
    task = bars.add_task(title, total=total, completed=done, text="", rate="")

    def advance(steps: int = 1, text: str = "") -> None:
      # Of the last steps, as the time that is left is.
      speed = bars.tasks[bars.task_ids.index(task)].speed
      shown = "" if rate is None or speed is None else rate(speed)
      bars.update(task, advance=steps, text=text, rate=shown)

    return advance

  def print(self, line: str) -> None:
    """Prints a line, above the bars where there are any."""
    if self._bars is None:
      print(line, flush=True)
    else:
      self._bars.console.print(line, markup=False, highlight=False)


def _rich_bars() -> Any:
  from rich import progress

  return progress.Progress(
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[text]}"),
    progress.TextColumn("{task.fields[rate]}"),
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
  )

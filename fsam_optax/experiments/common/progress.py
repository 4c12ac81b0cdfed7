"""Progress bars where stdout is a terminal, and nothing elsewhere."""

import sys
from typing import Any, Callable

Advance = Callable[..., None]


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

  def start(self, title: str, total: int, *, done: int = 0) -> Advance:
    """Opens a bar.

    Args:
      title: what it is of.
      total: number of steps.
      done: steps that were taken before.

    Returns:
      ``advance(steps=1, text="")``: moves the bar, and shows a text beside it.
    """
    bars = self._bars
    if bars is None:
      return lambda steps=1, text="": None
    task = bars.add_task(title, total=total, completed=done, text="")
    return lambda steps=1, text="": bars.update(task, advance=steps, text=text)

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
    progress.TimeElapsedColumn(),
    progress.TimeRemainingColumn(),
  )

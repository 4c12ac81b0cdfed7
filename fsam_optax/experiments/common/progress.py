"""Progress bars where stdout is a terminal, and nothing elsewhere."""

import sys
from typing import Callable

from rich import progress

Advance = Callable[..., None]


class Bars:
  """Shows a bar for each task; a context, in which the bars are alive."""

  def __init__(self) -> None:
    self._bars = progress.Progress(
      progress.TextColumn("{task.description}"),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[text]}"),
      progress.TimeElapsedColumn(),
      progress.TimeRemainingColumn(),
      disable=not sys.stdout.isatty(),
    )

  def __enter__(self) -> "Bars":
    self._bars.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if not self._bars.disable:  # It would print an empty line.
      self._bars.stop()

  def start(self, title: str, total: int, *, done: int = 0) -> Advance:
    """Opens a bar of ``total`` steps, of which some are done.

    Returns:
      ``advance(steps=1, text="")``: moves the bar, and shows a text beside it.
    """
    bars = self._bars
    task = bars.add_task(title, total=total, completed=done, text="")
    return lambda steps=1, text="": bars.update(task, advance=steps, text=text)

  def print(self, line: str) -> None:
    """Prints a line, above the bars where there are any."""
    if self._bars.disable:
      print(line, flush=True)
    else:
      self._bars.console.print(line, markup=False, highlight=False)

"""Progress bars where stdout is a terminal, and nothing elsewhere."""

import functools
import sys
from typing import Callable

from rich import progress

Advance = Callable[[], None]


class Bars(progress.Progress):
  """Shows a bar for each task; a context, in which the bars are alive."""

  def __init__(self) -> None:
    super().__init__(
      progress.TextColumn("{task.description}"),
      progress.BarColumn(),
      progress.MofNCompleteColumn(),
      progress.TextColumn("{task.fields[text]}"),
      progress.TimeElapsedColumn(),
      progress.TimeRemainingColumn(),
      disable=not sys.stdout.isatty(),
    )

  def bar(self, title: str, total: int) -> Advance:
    """Opens a bar of so many steps; returns what moves it by one."""
    task = self.add_task(title, total=total, text="")
    return functools.partial(self.advance, task)

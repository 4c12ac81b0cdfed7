"""A progress bar, by rich where one is wished for."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib

Tick = Callable[[], object]


@contextlib.contextmanager
def progress_bar(is_shown: bool, title: str, total: int) -> Iterator[Tick]:
  """Yields a function that moves the bar by one of so many steps.

  Where no bar is shown it does nothing.
  """
  if not is_shown:
    yield lambda: None
    return
  try:
    from rich import progress
  except ImportError as error:
    raise ImportError(
      "`progress=True` needs rich. Run: pip install rich"
    ) from error

  with progress.Progress(
    progress.TextColumn("{task.description}"),
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TimeRemainingColumn(),
  ) as bars:
    task = bars.add_task(title, total=total)
    yield lambda: bars.advance(task)

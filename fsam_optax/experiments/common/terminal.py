"""What reaches the terminal: nothing that steers it, and no end with it."""

import contextlib
import io
import os
import sys
from typing import Any, Iterator, NoReturn

PROGRAM = "python -m fsam_optax"


def end(program: str, message: object) -> NoReturn:
  """Ends the process with a line on stderr and status 2."""
  print(f"{program}: error: {message}", file=sys.stderr)
  sys.exit(2)


def printable(text: Any) -> str:
  """Text of a file, with what would steer a terminal spelled out."""
  return "".join(
    x if x.isprintable() else x.encode("unicode_escape").decode()
    for x in str(text)
  )


@contextlib.contextmanager
def outliving_streams() -> Iterator[None]:
  """Goes on where stdout or stderr is closed, as by ``| head``.

  Where one is of ASCII, which has no plus-minus sign, that is spelled out.
  """
  before = sys.stdout, sys.stderr
  for stream in before:
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors="backslashreplace")
  sys.stdout, sys.stderr = map(_Outliving, before)
  try:
    yield
  finally:
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        stream.flush()
    sys.stdout, sys.stderr = before


class _Outliving:
  """A stream that swallows what nobody reads any more."""

  def __init__(self, stream: Any) -> None:
    self._stream = stream

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    self._try(self._stream.write, text)
    return len(text)

  def flush(self) -> None:
    self._try(self._stream.flush)

  def _try(self, call: Any, *arguments: str) -> None:
    try:
      call(*arguments)
    except BrokenPipeError:
      # What is buffered goes where it does no harm, at the end of Python, too.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())
      os.close(nowhere)

"""The folder of a run: who holds it, and what it was begun with.

All that is written here is written whole or not at all, so that a run that is
killed at any moment finds something to go on from.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

from fsam_optax.experiments.common import files

REMEDY = (
  "Remove the cause, such as a full disk, and give the same command again: it "
  "goes on from the last whole checkpoint"
)


class FolderError(RuntimeError):
  """A folder that a run cannot use, or that cannot be written to."""


@contextlib.contextmanager
def lock(folder: pathlib.Path) -> Iterator[None]:
  """Holds a folder for this process, for as long as it lives.

  Args:
    folder: exists.

  Raises:
    FolderError: if another process holds it; names that one.
  """
  path = folder / "lock"
  with path.open("a+") as file:
    try:
      # Of the system, and so gone with the process, however it ends.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise FolderError(
        f"--output must not be in use, got {str(folder)!r}, in which "
        f"{file.read().strip() or 'another process'} is running. Wait for it, "
        "or choose another folder"
      ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    yield


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Makes a FolderError of what goes wrong while a file is written."""
  try:
    yield
  except OSError as error:
    raise FolderError(
      f"{str(path)!r} cannot be written ({error.strerror}). {REMEDY}"
    ) from error


def check_config(folder: pathlib.Path, config: dict[str, Any]) -> None:
  """Compares with what the folder was begun with, or begins it.

  Args:
    folder: exists.
    config: all that the numbers depend on, by flag, as JSON has it.

  Raises:
    FolderError: if something differs; names the flags and both values.
  """
  path = folder / "config.json"
  config = json.loads(json.dumps(config))
  if not path.exists():
    with writing(path):
      files.write_json(config, path)
    return
  try:
    begun = json.loads(path.read_text())
  except ValueError as error:
    raise FolderError(
      f"{str(path)!r} must be JSON, got a file that is damaged ({error}). "
      "Choose another --output"
    ) from error
  changed = [
    f"{name} {_shown(begun.get(name))}, got {_shown(config.get(name))}"
    for name in {**begun, **config}
    if begun.get(name) != config.get(name)
  ]
  if changed:
    raise FolderError(
      f"the run in {str(folder)!r} was begun with {'; '.join(changed)}. Give "
      "what it was begun with, or another --output"
    )


def _shown(value: Any) -> str:
  if value is None:
    return "none"
  if isinstance(value, list):
    return " ".join(map(str, value))
  return f"{value:g}" if isinstance(value, float) else str(value)

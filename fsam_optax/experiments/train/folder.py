"""The folder of a run: who holds it, and what it was begun with.

All that is written here is written whole or not at all, so that a run that is
killed at any moment finds something to go on from.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
from typing import Any

import jax

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.terminal import printable

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
  with contextlib.ExitStack() as stack:
    try:
      # Of the folder besides: whoever deletes the file lets nobody in.
      held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
      stack.callback(os.close, held)
      # Not through a link, which may lead to somebody's file.
      opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
      file = stack.enter_context(os.fdopen(opened, "r+", errors="replace"))
      # Of the system, and so gone with the process, however it ends.
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      with _unsupported():
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      holder = ""
      with contextlib.suppress(OSError):
        holder = printable(path.read_text(errors="replace")[:200].strip())
      raise FolderError(
        f"--output must not be in use, got {str(folder)!r}, in which "
        f"{holder or 'another process'} is running. Wait for it, or choose "
        "another folder"
      ) from None
    except OSError as error:
      raise FolderError(
        f"{str(path)!r} must be a file of this program, got "
        f"{'a link' if error.errno == errno.ELOOP else error.strerror}. Remove "
        "it, or choose another --output"
      ) from error
    with writing(path):
      file.truncate(0)
      file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
      file.flush()
    yield


@contextlib.contextmanager
def _unsupported() -> Iterator[None]:
  """Lets a file system pass that locks no folders, but no other process."""
  try:
    yield
  except BlockingIOError:
    raise
  except OSError:
    pass


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
  config["random numbers"] = str(jax.random.key_impl(jax.random.key(0)))
  if not path.exists():
    if begun_at := next(folder.glob("seed-*/checkpoints/[0-9]*"), None):
      raise FolderError(
        f"{str(path)!r} must lie beside the checkpoints, got none with "
        f"{str(begun_at)!r}: nobody knows by which flags that was trained. Put "
        "it back, or choose another --output"
      )
    with writing(path):
      files.write_json({**config, _VERSIONS: files.versions()}, path)
    return
  begun = _read(path)
  begun.pop(_VERSIONS, None)
  changed = [
    f"{printable(name)[:80]} {_shown(begun.get(name))}, got "
    f"{_shown(config.get(name))}"
    for name in {**config, **begun}
    if begun.get(name) != config.get(name)
  ]
  if changed:
    raise FolderError(
      f"the run in {str(folder)!r} was begun with {'; '.join(changed)}. Give "
      "what it was begun with, or another --output"
    )


_VERSIONS = "versions"


def versions_since(folder: pathlib.Path) -> str:
  """The packages whose version is another than when the folder was begun.

  Args:
    folder: of the run.

  Returns:
    Such as ``jax 0.10.0 then, 0.10.2 now``, or nothing.
  """
  try:
    then = _read(folder / "config.json").get(_VERSIONS)
  except FolderError:
    return ""
  if not isinstance(then, dict):
    return ""
  return ", ".join(
    f"{name} {printable(then[name])} then, {now} now"
    for name, now in files.versions().items()
    if name in then and then[name] != now
  )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """A file of one JSON object."""
  try:
    begun = json.loads(path.read_text())
    if isinstance(begun, dict):
      return begun
    reason = f"it holds {type(begun).__name__}, and no object"
  except OSError as error:
    reason = error.strerror
  except (ValueError, RecursionError) as error:
    reason = printable(error)
  raise FolderError(
    f"{str(path)!r} must be the JSON that this program wrote, got a file that "
    f"cannot be read ({reason}). Put it back, or choose another --output"
  )


def _shown(value: Any) -> str:
  if value is None:
    return "none"
  if isinstance(value, list):
    return printable(" ".join(map(str, value)))[:200]
  return f"{value:g}" if isinstance(value, float) else printable(value)[:200]

"""The folder of a run: who holds it, and what it was begun with."""

import contextlib
import json
import pathlib
from typing import Any, Iterator

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.terminal import printable

REMEDY = (
  "Remove the cause, such as a full disk, and give the same command again: it "
  "goes on from the last whole checkpoint"
)


class RunError(RuntimeError):
  """Why a run cannot begin or go on, in one sentence."""


def lock(folder: pathlib.Path) -> contextlib.AbstractContextManager[Any]:
  """Holds a folder for this process, or raises a RunError."""
  import filelock

  try:
    return filelock.FileLock(folder / "lock", blocking=False).acquire()
  except OSError as error:  # Timeout is one.
    reason = error.strerror or "another process is running in it"
    raise RunError(
      f"--output must not be in use, got {str(folder)!r}, whose lock cannot be "
      f"taken ({reason}). Wait for it, or choose another folder"
    ) from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
  """Makes a RunError of an OSError."""
  try:
    yield
  except OSError as error:
    raise RunError(
      f"{str(path)!r} cannot be written ({error.strerror}). {REMEDY}"
    ) from error


def check_config(
  folder: pathlib.Path, config: dict[str, Any], defaults: dict[str, Any]
) -> str:
  """Compares the flags with those that the folder was begun with.

  A new folder is begun. An older run lacks flags: it had their defaults.

  Returns:
    The packages of which the run was begun with another version, if any.

  Raises:
    RunError: if something differs; names the flags and both values.
  """
  path = folder / "config.json"
  # As they come back: lists for tuples.
  config, defaults = json.loads(json.dumps([config, defaults]))
  versions = files.versions()
  if not path.exists():
    if any(folder.glob("seed-*/checkpoints/[0-9]*")):
      raise RunError(
        f"{str(path)!r} must lie beside the checkpoints, got none: nobody "
        "knows by which flags they were trained. Put it back, or choose "
        "another --output"
      )
    with writing(path):
      files.write_json({**config, "versions": versions}, path)
    return ""
  try:
    begun = defaults | json.loads(path.read_text())
    since = dict(begun.pop("versions", versions))
  except (OSError, ValueError, TypeError, RecursionError) as error:
    raise RunError(
      f"{str(path)!r} must be the JSON that this program wrote, got a file "
      f"that cannot be read ({printable(error)}). Put it back, or choose "
      "another --output"
    ) from error
  if changed := differences(begun, config, "{}, got {}"):
    raise RunError(
      f"the run in {str(folder)!r} was begun with {changed}. Give what it was "
      "begun with, or another --output"
    )
  return differences(since, versions, "{} then, {} now")


def differences(first: dict[str, Any], other: dict[str, Any], form: str) -> str:
  """What differs between two records, by name, for a sentence."""
  return "; ".join(
    f"{printable(name)[:80]} "
    + form.format(_shown(first.get(name)), _shown(other.get(name)))
    for name in {**other, **first}
    if first.get(name) != other.get(name)
  )


def _shown(value: Any) -> str:
  if value is None:
    return "none"
  if isinstance(value, list):
    value = " ".join(map(str, value))
  return f"{value:g}" if isinstance(value, float) else printable(value)[:200]

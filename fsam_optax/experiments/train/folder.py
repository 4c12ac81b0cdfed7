"""The folder of a run: who holds it, what it is of, its lines and checkpoints.

All that is written here is written whole or not at all, so that a run that is
killed at any moment finds something to go on from.
"""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import socket
from typing import Any, Callable, Optional

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from fsam_optax._checkpoint import check_checkpoint
from fsam_optax.experiments import report
from fsam_optax.experiments.program import checksum

_KEPT = 2  # The last one, and another for when that cannot be read.
_DELETED = "deleted"


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
      f"{str(path)!r} cannot be written ({error.strerror}). {_REMEDY}"
    ) from error


_REMEDY = (
  "Remove the cause, such as a full disk, and give the same command again: it "
  "goes on from the last whole checkpoint"
)


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
      report.write_json(config, path)
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
    return ",".join(map(str, value))
  return f"{value:g}" if isinstance(value, float) else str(value)


class Journal:
  """Metrics as JSON lines, each with the ``batches`` it was written after."""

  def __init__(self, path: pathlib.Path, batches: int) -> None:
    """Opens the file and drops what lies after a number of batches.

    Args:
      path: the file, which need not exist.
      batches: that the run goes on from: later lines, and one that was cut,
        will be written again.
    """
    self._path = path
    self.lines: list[dict[str, Any]] = []
    if not path.exists():
      return
    text = path.read_text(errors="replace")
    for line in text.splitlines():
      with contextlib.suppress(ValueError, TypeError, KeyError):
        parsed = json.loads(line)
        if parsed["batches"] <= batches:
          self.lines.append(parsed)
    kept = "".join(map(_as_line, self.lines))
    if kept != text:
      with writing(path):
        report.write_file(path, lambda file: file.write(kept.encode()))

  def append(self, line: dict[str, Any]) -> None:
    """Writes one more line, at once."""
    with writing(self._path), self._path.open("a") as file:
      file.write(_as_line(line))
    self.lines.append(line)


def _as_line(line: dict[str, Any]) -> str:
  return json.dumps(line, allow_nan=False) + "\n"


class Checkpoints:
  """The last two and the best state of a run, by Orbax, in the background."""

  def __init__(self, folder: pathlib.Path) -> None:
    """Opens a folder, which is made where it is missing."""
    self._folder = folder.absolute()
    self._delete()
    accuracy = lambda metrics: metrics["accuracy"]
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        best_fn=accuracy,
        preservation_policy=preservation_policy.AnyPreservationPolicy(
          [
            preservation_policy.LatestN(_KEPT),
            preservation_policy.BestN(get_metric_fn=accuracy, n=1),
          ]
        ),
        cleanup_tmp_directories=True,
        # By a renaming, for a kill to leave no half of a checkpoint behind.
        todelete_subdir=_DELETED,
      ),
      item_handlers=ocp.StandardCheckpointHandler(),
    )
    self.last: Optional[int] = None

  def save(
    self, batches: int, progress: Any, accuracy: Optional[float] = None
  ) -> None:
    """Begins to write a checkpoint.

    Args:
      batches: its number.
      progress: a tree of arrays, which may be donated once this returns.
      accuracy: of the evaluation, by which the best one is told; None between
        the epochs.

    Raises:
      FolderError: if this one or the one before cannot be written.
    """
    if batches == self.last:
      return
    tree = {"progress": progress, "checksum": checksum(progress)}
    with self._errors():
      # As saving does anyhow; and what it moves aside is not to be taken away
      # while it is at it.
      self._manager.wait_until_finished()
      self._delete()
      self._manager.save(
        batches,
        args=ocp.args.StandardSave(tree),
        metrics={"accuracy": -1.0 if accuracy is None else accuracy},
        force=True,
      )
    self.last = batches

  def check(self) -> None:
    """Raises a FolderError if a checkpoint could not be written."""
    with self._errors():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits until all is written, or raises a FolderError."""
    with self._errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Ends the threads. To be called after :meth:`wait`."""
    with contextlib.suppress(Exception):  # It was reported.
      self._manager.close()
    self._delete()

  def restore(self, progress: Any, warn: Callable[[str], None]) -> Any:
    """Reads the last checkpoint that is whole.

    One that is not, because a file in it was cut, lost or changed, is moved
    aside once the one before has been read. Where there is none, all stay.

    Args:
      progress: shapes, dtypes and shardings of the tree.
      warn: gets a line for each checkpoint that was moved aside.

    Returns:
      The tree, or None where the folder holds no checkpoint.

    Raises:
      FolderError: if none of them can be read, or they hold other arrays.
    """
    found = sorted(self._manager.all_steps(), reverse=True)
    tree = {
      "progress": progress,
      "checksum": jax.ShapeDtypeStruct(
        (len(jax.tree.leaves(progress)),),
        np.uint32,
        sharding=progress.batches.sharding,
      ),
    }
    broken: dict[int, Exception] = {}
    for batches in found:
      try:
        read = self._read(batches, tree)
      except FolderError:
        raise
      except Exception as error:  # Of many kinds, by what was damaged.
        broken[batches] = error
        continue
      for number, reason in broken.items():
        warn(
          f"checkpoint {number} cannot be read and was moved to "
          f"{self._set_aside(number)} ({_first_line(reason)}); going on from "
          f"checkpoint {batches}"
        )
      self.last = batches
      return read
    if found:
      raise FolderError(
        f"none of the {len(found)} checkpoints in {str(self._folder)!r} can be "
        "read. To begin anew, choose another --output"
      )
    return None

  def _read(self, batches: int, tree: dict[str, Any]) -> Any:
    """The progress in a checkpoint, or some error if it is not whole."""
    metadata = self._manager.item_metadata(batches)
    if getattr(metadata, "tree", metadata) is None:
      raise ValueError("it has no metadata")
    try:
      check_checkpoint(metadata, tree)
    except ValueError as error:
      raise FolderError(
        f"checkpoint {batches} in {str(self._folder)!r} is of another version "
        f"of this program: {error}"
      ) from error
    read = self._manager.restore(batches, args=ocp.args.StandardRestore(tree))
    sums = np.asarray(checksum(read["progress"]))
    if (sums != np.asarray(read["checksum"])).any():
      raise ValueError("its checksum is wrong: a part of it is lost")
    return read["progress"]

  def _set_aside(self, batches: int) -> pathlib.Path:
    aside = self._folder.parent / f"broken-checkpoint-{batches}"
    while aside.exists():
      aside = aside.with_name(f"{aside.name}-again")
    meet = multihost_utils.sync_global_devices
    meet(f"all looked at {batches}")
    if jax.process_index() == 0:
      (self._folder / str(batches)).rename(aside)
    meet(f"moved {batches}")
    self._manager.reload()
    return aside

  def _delete(self) -> None:
    if jax.process_index() == 0:
      shutil.rmtree(self._folder / _DELETED, ignore_errors=True)

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      whole = sorted(
        int(path.name)
        for path in self._folder.iterdir()
        if path.name.isdecimal()
      )
      last = f"the last whole one is {whole[-1]}" if whole else "there is none"
      raise FolderError(
        f"a checkpoint cannot be written to {str(self._folder)!r} "
        f"({_first_line(error)}); {last}. {_REMEDY}"
      ) from error


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:300]

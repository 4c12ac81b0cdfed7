"""The checkpoints of a run: the last two and the best, by Orbax.

A checkpoint has two items: ``progress``, the arrays with a checksum, and
``means``, the sums of the epoch so far as numbers by name. What is reported
can so change without an old checkpoint becoming unreadable.
"""

from collections.abc import Iterator
import contextlib
import json
import pathlib
import shutil
from typing import Any, Callable, Optional
import zlib

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

import fsam_optax
from fsam_optax.experiments.common import files
from fsam_optax.experiments.train.checksum import checksum
from fsam_optax.experiments.train.folder import REMEDY
from fsam_optax.experiments.train.folder import FolderError
from fsam_optax.experiments.train.folder import versions_since
from fsam_optax.experiments.train.folder import writing

_KEPT = 2  # The last one, and another for when that cannot be read.
_DELETED = "deleted"


class _Manager(ocp.CheckpointManager):
  """Orbax's, but for one question that it asks JAX by the number of a batch.

  JAX finds the step at which all processes end by a count that never goes back;
  the number of a batch does, at the next seed. The run asks by its own count.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpoints:
  """The last two and the best state of a run, written in the background.

  Attributes:
    last: number of the last one that was written or read, None before.
  """

  def __init__(self, folder: pathlib.Path, warn: Callable[[str], None]) -> None:
    """Opens a folder, which is made where it is missing.

    Args:
      folder: of the checkpoints.
      warn: gets a line for each checkpoint that was repaired or moved aside.

    Raises:
      FolderError: if the folder cannot be read.
    """
    self._folder, self._warn = folder.absolute(), warn
    self._delete()
    self._repair()
    accuracy = lambda metrics: metrics["accuracy"]
    self._manager = _Manager(
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
        # An old one is renamed first, which is done or not done, and taken
        # away later: a kill leaves no half of a checkpoint behind.
        todelete_subdir=_DELETED,
      ),
      item_handlers={
        "progress": ocp.StandardCheckpointHandler(),
        "means": ocp.JsonCheckpointHandler(),
      },
    )
    self.last: Optional[int] = None

  def save(
    self,
    batches: int,
    progress: Any,
    means: dict[str, Any],
    accuracy: Optional[float] = None,
  ) -> None:
    """Begins to write a checkpoint.

    Args:
      batches: its number.
      progress: a tree of arrays, which may be donated once this returns.
      means: what JSON can hold.
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
        args=ocp.args.Composite(
          progress=ocp.args.StandardSave(tree),
          means=ocp.args.JsonSave({"means": means, "crc32": _crc32(means)}),
        ),
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

  def restore(self, progress: Any) -> Optional[tuple[Any, dict[str, Any]]]:
    """Reads the last checkpoint that is whole.

    One that is not, because a file in it was cut, lost or changed, is moved
    aside once the one before has been read. Where there is none, all stay.

    Args:
      progress: shapes, dtypes and shardings of the tree.

    Returns:
      The tree and the means, or None where the folder holds no checkpoint.

    Raises:
      FolderError: if none of them can be read, or they hold other arrays.
    """
    found = sorted(self._manager.all_steps(), reverse=True)
    broken: dict[int, Exception] = {}
    for batches in found:
      try:
        read = self._read(batches, progress)
      except FolderError:
        raise
      except Exception as error:  # Of many kinds, by what was damaged.
        broken[batches] = error
        continue
      for number, reason in broken.items():
        self._warn(
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

  def _read(self, batches: int, progress: Any) -> tuple[Any, dict[str, Any]]:
    """What is in a checkpoint, or some error if it is not whole."""
    tree = {
      "progress": progress,
      "checksum": jax.ShapeDtypeStruct(
        (len(jax.tree.leaves(progress)),),
        np.uint32,
        sharding=progress.batches.sharding,
      ),
    }
    metadata = self._manager.item_metadata(batches)["progress"]
    if getattr(metadata, "tree", metadata) is None:
      raise ValueError("it has no metadata")
    try:
      fsam_optax.checkpoint.check(metadata, tree)
    except ValueError as error:
      raise FolderError(
        f"checkpoint {batches} in {str(self._folder)!r} holds other arrays "
        f"than this program trains: {error} "
        f"{versions_since(self._folder.parent.parent) or 'The versions agree'}"
      ) from error
    read = self._manager.restore(
      batches,
      args=ocp.args.Composite(
        progress=ocp.args.StandardRestore(tree),
        means=ocp.args.JsonRestore(),
      ),
    )
    found, means = read["progress"], read["means"]
    if (np.asarray(checksum(found["progress"])) != found["checksum"]).any():
      raise ValueError("its checksum is wrong: a part of it is lost")
    if means["crc32"] != _crc32(means["means"]):
      raise ValueError("the checksum of its means is wrong")
    if int(found["progress"].batches) != batches:
      raise ValueError("it is of another number of batches")
    return found["progress"], means["means"]

  def _repair(self) -> None:
    """Gives a checkpoint whose accuracy cannot be read the least of all.

    Orbax reads them all before anything else, and needs them to tell the best
    one alone: the arrays beside them may be whole.
    """
    is_first = jax.process_index() == 0
    for path in sorted(self._folder.glob("[0-9]*/metrics/metrics")):
      try:
        accuracy = json.loads(path.read_text())["accuracy"]
        is_number = isinstance(accuracy, (int, float)) and accuracy >= -1
      except (OSError, ValueError, TypeError, KeyError, RecursionError):
        is_number = False
      if not is_number and is_first:
        with writing(path):
          files.write_json({"accuracy": -1.0}, path)
        self._warn(
          f"the accuracy of checkpoint {path.parents[1].name} cannot be read; "
          "it is not taken for the best"
        )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("all can read the accuracies")

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
        f"({_first_line(error)}); {last}. {REMEDY}"
      ) from error


def _crc32(numbers: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(numbers, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:300]

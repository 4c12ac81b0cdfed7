"""The checkpoints of a seed: the last two and the best, by Orbax.

A checkpoint has two items: ``progress``, the arrays with a checksum, and
``record``, the seed and the line of each epoch. Reports are made of that
record, so that no number of another run or epoch gets into them.
"""

import contextlib
import json
import pathlib
import time
from typing import Any, Iterator, Optional
import zlib

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

import fsam_optax
from fsam_optax.experiments.train import job
from fsam_optax.experiments.train.run_folder import REMEDY
from fsam_optax.experiments.train.run_folder import RunError
from fsam_optax.experiments.train.run_state import RunState


class _Manager(ocp.CheckpointManager):
  """A manager that looks for no signal to end, and says why it failed."""

  failure: Optional[str] = None

  def reached_preemption(self, step: int) -> bool:
    # JAX asks for a count that never goes back, which the run has. The number
    # of a batch goes back at the next seed.
    del step
    return False

  def _wait_for_checkpointers(self) -> None:
    # In the thread in which Orbax, after an error, waits for the other
    # processes, which wait for this one's part.
    try:
      super()._wait_for_checkpointers()
    except Exception as error:
      self.failure = _first_line(error)
      raise


# The newest may turn out to be damaged.
_LAST_TWO = preservation_policy.LatestN(2)


class Checkpoints:
  """The last two and the best state of a seed, written in the background.

  Attributes:
    epochs: the line of each epoch up to now.
  """

  def __init__(self, folder: pathlib.Path, seed: int) -> None:
    """Opens a folder, which is made where it is missing."""
    self._folder, self._seed = folder.absolute(), seed
    self._kept = preservation_policy.AnyPreservationPolicy([_LAST_TWO])
    self.epochs: list[dict[str, Any]] = []
    options = ocp.CheckpointManagerOptions(
      preservation_policy=self._kept, cleanup_tmp_directories=True
    )
    items = {
      "progress": ocp.StandardCheckpointHandler(),
      "record": ocp.JsonCheckpointHandler(),
    }
    with self._errors():
      self._manager = _Manager(
        self._folder, options=options, item_handlers=items
      )

  def save(self, batches: int, run_state: RunState) -> None:
    """Begins to write a checkpoint; the state may be donated then.

    Raises:
      RunError: if this one or the one before cannot be written.
    """
    self.wait()
    tree = {"progress": run_state, "checksum": checksum(run_state)}
    record = {"seed": self._seed, "epochs": list(self.epochs)}
    if self.epochs:
      of_best = preservation_policy.CustomSteps([best(self.epochs)["batches"]])
      self._kept.policies = [_LAST_TWO, of_best]
    with self._errors():
      self._manager.save(
        batches,
        args=ocp.args.Composite(
          progress=ocp.args.StandardSave(tree),
          record=ocp.args.JsonSave({**record, "crc32": _crc32(record)}),
        ),
        force=True,
      )

  @property
  def has_failed(self) -> bool:
    """Whether a part of a checkpoint could not be written."""
    return self._manager.failure is not None

  def wait(self) -> None:
    """Waits for the checkpoint that is being written, in all processes.

    Raises:
      RunError: in each of them, if one could not write its part.
    """
    with self._errors():
      is_busy = True
      while is_busy:
        mine = self._manager.failure, self._manager.is_saving_in_progress()
        failures, busy = zip(*job.gather(mine), strict=True)
        for number, failure in enumerate(failures):
          if failure is not None:
            self._manager.failure = failure
            where = f"in process {number}: " if len(failures) > 1 else ""
            raise OSError(f"{where}{failure}")
        if is_busy := any(busy):
          time.sleep(0.02)
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Ends the threads; after an error one may wait forever."""
    if not self.has_failed:
      with contextlib.suppress(Exception):  # It was reported.
        self._manager.close()

  def restore(self, abstract: RunState) -> Optional[RunState]:
    """Reads the last checkpoint that is whole; None where there are none.

    Those after it, in which a file was cut, lost or changed, are moved aside.

    Raises:
      RunError: if none of the checkpoints can be read.
    """
    steps = sorted(self._manager.all_steps(), reverse=True)
    broken: dict[int, str] = {}
    for batches in steps:
      try:
        run_state, self.epochs = self._read(batches, abstract)
      except Exception as error:  # Of many kinds, by what was damaged.
        broken[batches] = _first_line(error)
        continue
      for number, reason in broken.items():
        job.warn(
          f"checkpoint {number} cannot be read and was moved to "
          f"{self._set_aside(number)} ({reason}); going on from checkpoint "
          f"{batches}"
        )
      return run_state
    if steps:
      raise RunError(
        f"none of the {len(steps)} checkpoints in {str(self._folder)!r} can be "
        f"read ({broken[steps[0]]}). To begin anew, choose another --output"
      )
    return None

  def _read(
    self, batches: int, abstract: RunState
  ) -> tuple[RunState, list[dict[str, Any]]]:
    words = jax.eval_shape(checksum, abstract).update(
      sharding=abstract.batches.sharding
    )
    tree = {"progress": abstract, "checksum": words}
    fsam_optax.checkpoint.check(
      self._manager.item_metadata(batches)["progress"], tree
    )
    read = self._manager.restore(
      batches,
      args=ocp.args.Composite(
        progress=ocp.args.StandardRestore(tree),
        record=ocp.args.JsonRestore(),
      ),
    )
    run_state, record = read["progress"]["progress"], read["record"]
    if (np.asarray(checksum(run_state)) != read["progress"]["checksum"]).any():
      raise ValueError("its checksum is wrong: a part of it is lost")
    if record.pop("crc32") != _crc32(record):
      raise ValueError("the checksum of its record is wrong")
    if int(run_state.batches) != batches or record["seed"] != self._seed:
      raise ValueError(
        f"it is of seed {record['seed']} and batch {int(run_state.batches)}"
      )
    return run_state, record["epochs"]

  def _set_aside(self, batches: int) -> pathlib.Path:
    aside = self._folder.parent / f"broken-checkpoint-{batches}"
    while aside.exists():
      aside = aside.with_name(f"{aside.name}-again")
    meet = multihost_utils.sync_global_devices
    meet(f"all looked at {batches}")
    if job.is_first():
      (self._folder / str(batches)).rename(aside)
    meet(f"moved {batches}")
    self._manager.reload()
    return aside

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      raise RunError(
        f"a checkpoint cannot be written to {str(self._folder)!r} "
        f"({_first_line(error)}). {REMEDY}"
      ) from error


def best(epochs: list[dict[str, Any]]) -> dict[str, Any]:
  """The line of the best evaluation, of several the last."""
  (name,) = (x for x in epochs[-1] if x.endswith("_accuracy"))
  return max(epochs, key=lambda line: (line[name], line["epoch"]))


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """One word for each array: its bits, each word by a weight of its place.

  Orbax fills what is lost with zeros. A sum of integers does not depend on how
  an array is split over devices.
  """

  def word_of(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    kind = jnp.dtype(f"uint{min(32, 8 * x.dtype.itemsize)}")
    words = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
    places = jnp.arange(words.size, dtype=jnp.uint32)
    # Odd, and so invertible: a change of one word changes the sum.
    weights = 2 * places.reshape(words.shape) + 1
    return jnp.sum(words * weights, dtype=jnp.uint32)

  return jnp.stack([word_of(x) for x in jax.tree.leaves(tree)])


def _crc32(record: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines()
  return (lines[0] if lines else type(error).__name__)[:300]

"""The devices of a run, and the processes that it is joined from."""

import hashlib
import json
import os
import pathlib
import re
import secrets
import sys
import time
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train.flags import Processes


class JoinError(RuntimeError):
  """A job of which not all processes came."""


def join(processes: Processes) -> None:
  """Joins the job that the flags speak of, before anything asks for devices.

  Args:
    processes: what the flags say.

  Raises:
    JoinError: if others did not come in time, where JAX leaves time to say so.
  """
  if not processes.is_job:
    return
  if processes.coordinator_address is not None:
    # Said before, as JAX ends a process that waits in vain from within C++,
    # where nothing can be added to its message.
    print(
      f"process {processes.process_id} of {processes.num_processes}: waiting "
      f"for the others, up to {processes.timeout} s, at "
      f"{processes.coordinator_address}",
      file=sys.stderr,
      flush=True,
    )
  try:
    jax.distributed.initialize(
      processes.coordinator_address,
      processes.num_processes,
      processes.process_id,
      initialization_timeout=processes.timeout,
      # At that address alone: JAX's service would listen at every one that the
      # machine has, and it asks nobody who they are.
      coordinator_bind_address=processes.coordinator_address,
    )
  except (RuntimeError, ValueError) as error:
    raise JoinError(
      f"the processes of the job must all come within {processes.timeout} s, "
      f"got: {_sentence(error)}. Look at what they printed, and start all of "
      "them again"
    ) from error


def _sentence(error: Exception) -> str:
  """The message of JAX in one line."""
  return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")


def check_alike(values: dict[str, Any]) -> None:
  """Raises unless every process of a job was given the same.

  Args:
    values: what the numbers depend on, and what the processes do together, by
      flag; as JSON has them.

  Raises:
    JoinError: names the flags, and the values of both processes.
  """
  if jax.process_count() == 1:
    return
  text = {name: json.dumps(x, sort_keys=True) for name, x in values.items()}
  # Of one size in every process, whatever they were given.
  names = _gather(_digest("\n".join(text)))
  if (names != names[0]).any():
    raise JoinError(
      "the processes of the job must all run one version of this program, got "
      f"others than that of process 0 in {_differing(names)}"
    )
  digests = _gather(np.stack([_digest(x) for x in text.values()]))
  differs = (digests != digests[0]).any(axis=(0, 2))
  if not differs.any():
    return
  found = []
  for i in np.flatnonzero(differs):
    name = list(text)[i]
    buffer = np.zeros(_SHOWN, np.uint8)
    shown = np.frombuffer(text[name].encode()[:_SHOWN], np.uint8)
    buffer[: len(shown)] = shown
    words = [
      bytes(row[row != 0]).decode(errors="replace") for row in _gather(buffer)
    ]
    other = int(np.argmax((digests[:, i] != digests[0, i]).any(axis=1)))
    found.append(
      f"{name} {words[0]} in process 0 and {words[other]} in process {other}"
    )
  raise JoinError(
    f"the processes of the job must all be given the same, got "
    f"{'; '.join(found)}. Start all of them again with the same flags and data"
  )


def check_shared(folder: pathlib.Path, timeout: float = 30.0) -> None:
  """Raises unless every process of a job sees what the first one writes.

  Args:
    folder: of the run; the first process has made it.
    timeout: seconds that a file may take to be seen on another machine.

  Raises:
    JoinError: names the processes that see another folder.
  """
  if jax.process_count() == 1:
    return
  drawn = np.uint32(secrets.randbits(32))
  token = int(multihost_utils.broadcast_one_to_all(drawn))
  path = folder / f".seen-by-all-{token:08x}"
  reason = ""
  if jax.process_index() == 0:
    try:
      path.touch()
    except OSError as error:
      reason = f" ({error.strerror})"
  end, is_seen = time.monotonic() + timeout, False
  while not is_seen and time.monotonic() < end and not reason:
    is_seen = path.exists()
    time.sleep(0.0 if is_seen else 0.1)
  seen = _gather(np.array([is_seen], np.uint8))
  if jax.process_index() == 0:
    path.unlink(missing_ok=True)
  if not seen.all():
    raise JoinError(
      f"--output must be one folder that every process sees, got "
      f"{str(folder)!r}, in which {_differing(seen, 1)} does "
      f"not see what process 0 writes{reason}. Name one on a file system that "
      "the machines share"
    )


_SHOWN = 200


def _digest(text: str) -> np.ndarray:
  return np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)


def _gather(x: np.ndarray) -> np.ndarray:
  """The array of every process, with an axis over them in front."""
  return np.asarray(multihost_utils.process_allgather(x))


def _differing(gathered: np.ndarray, wanted: Any = None) -> str:
  """The processes whose row is not the one that is wanted, that of process 0.

  Args:
    gathered: shape ``[processes, ...]``.
    wanted: what a row should be; None for the first.

  Returns:
    Such as ``process 1, 3``.
  """
  wanted = gathered[0] if wanted is None else wanted
  rows = (gathered != wanted).reshape(len(gathered), -1).any(axis=1)
  return f"process {', '.join(map(str, np.flatnonzero(rows)))}"


def mesh_of(processes: Processes) -> jax.sharding.Mesh:
  """The devices of the flags, all of them or the first.

  Args:
    processes: what the flags say.

  Returns:
    A mesh of one axis, ``batch``.

  Raises:
    FlagError: if there are fewer.
  """
  devices = jax.devices()
  number = processes.devices or len(devices)
  if number > len(devices):
    raise FlagError(
      "--devices", f"must be at most {len(devices)}, got {number}"
    )
  return jax.make_mesh(
    (number,),
    ("batch",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices[:number],
  )


def end(message: str, status: int) -> NoReturn:
  """Ends the process, without a wait for other ones.

  Args:
    message: for stderr, or nothing.
    status: of the process.
  """
  if message:
    print(message, file=sys.stderr)
  if jax.process_count() == 1:
    sys.exit(status)
  # Not by the normal exit, where JAX waits for the process that died.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)

"""The devices of a run, and the processes that it is joined from."""

import os
import re
import sys
from typing import NoReturn

import jax

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

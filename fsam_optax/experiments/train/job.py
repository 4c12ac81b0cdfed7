"""The processes that a run is joined from, and what they have to agree on."""

import collections
import json
import os
import pathlib
import re
import sys
import time
from typing import Any, NoReturn

import jax
from jax.experimental import multihost_utils
import numpy as np

from fsam_optax.experiments.train.flags_and_recipes import Processes
from fsam_optax.experiments.train.run_folder import RunError
from fsam_optax.experiments.train.run_folder import differences

_SECONDS_FOR_OTHERS, _SECONDS_TO_SEE_A_FILE = 5, 30


def join(processes: Processes) -> None:
  """Joins the job that the flags speak of, before anything asks for devices.

  Raises:
    RunError: if others did not come in time, where JAX leaves time to say so,
      or have another number of devices.
  """
  address, number = processes.coordinator_address, processes.num_processes
  job = address, number, processes.process_id
  if not processes.distributed and job == (None, None, None):
    return
  if address is not None:
    # Said before: JAX ends a process that waits in vain from within C++.
    print(
      f"process {processes.process_id} of {number}: waiting for the others, "
      f"up to {processes.timeout} s, at {address}",
      file=sys.stderr,
      flush=True,
    )
  try:
    jax.distributed.initialize(
      *job,
      initialization_timeout=processes.timeout,
      # Else JAX listens at every address, and it asks nobody who they are.
      coordinator_bind_address=address,
    )
  except (RuntimeError, ValueError) as error:
    reason = re.sub(r"\s+", " ", str(error)).strip().rstrip(".")
    raise RunError(
      "all processes must join the job, each by --coordinator-address, "
      f"--num-processes and its --process-id, got: {reason}. Look at what the "
      "others printed, and start all of them again"
    ) from error
  devices = collections.Counter(x.process_index for x in jax.devices())
  if len(set(devices.values())) > 1:
    raise RunError(
      "the processes of the job must have the same number of devices, got "
      f"{', '.join(str(n) for _, n in sorted(devices.items()))}"
    )


def gather(value: Any) -> list[Any]:
  """What every process of the job has for a value of JSON, in their order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  longest = multihost_utils.process_allgather(np.int32(len(text))).max()
  filled = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
  texts = np.asarray(multihost_utils.process_allgather(filled))
  return [json.loads(bytes(text)) for text in texts]


def check_alike(values: dict[str, Any]) -> None:
  """Raises a RunError unless all processes have the same values, by flag."""
  first, *others = gather(values)
  for number, other in enumerate(others, start=1):
    form = f"{{}} in process 0 and {{}} in process {number}"
    if differing := differences(first, other, form):
      raise RunError(
        f"the processes of the job must all be given the same, got {differing}."
        " Start all of them again with the same flags, data and versions"
      )


def check_shared(path: pathlib.Path) -> None:
  """Raises a RunError unless every process sees a file of the first."""
  end = time.monotonic() + _SECONDS_TO_SEE_A_FILE
  while not (is_seen := path.exists()) and time.monotonic() < end:
    time.sleep(0.1)
  if blind := [str(i) for i, x in enumerate(gather(is_seen)) if not x]:
    raise RunError(
      "--output must be one folder that every process sees, got "
      f"{str(path.parent)!r}, in which process {', '.join(blind)} does not see "
      "what process 0 writes. Name one on a file system that the machines share"
    )


def is_first() -> bool:
  """Whether this is the process that writes and prints for the job."""
  return jax.process_index() == 0


def warn(message: str) -> None:
  """Says something on stderr, once for the job."""
  if is_first():
    print(f"warning: {message}", file=sys.stderr, flush=True)


def end(message: str, status: int) -> NoReturn:
  """Ends the process, without a wait for other ones or for threads."""
  print(message, file=sys.stderr)
  # Not by the normal exit, where JAX waits for a process that died, and Python
  # for the threads of a checkpoint that cannot be written.
  sys.stdout.flush()
  sys.stderr.flush()
  if jax.distributed.is_initialized() and is_first():
    # With the first process JAX ends the others, before they say what is wrong.
    time.sleep(_SECONDS_FOR_OTHERS)
  os._exit(status)

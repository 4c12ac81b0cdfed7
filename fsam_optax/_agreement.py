"""The processes of a job: their start, and whether they agree.

Processes that are not all there, or that run different programs, wait for each
other forever. Here they get an error instead.
"""

import contextlib
import errno
import hashlib
import select
import socket
import time
from typing import Any, Optional

import jax
from jax.experimental import multihost_utils
import numpy as np

_GREETING = "fsam_optax"
_LONGEST = 4096  # Bytes of a message or a description.
_SECONDS_TO_SPEAK = 1.0


def initialize_processes(
  coordinator_address: Optional[str] = None,
  num_processes: Optional[int] = None,
  process_id: Optional[int] = None,
  *,
  timeout: int = 300,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins the processes of a job, by :func:`jax.distributed.initialize`.

  Called once in every process, before anything asks for the devices. JAX alone
  ends a process whose partners do not come, without saying which. Here process
  0 first counts the others, at the coordinator's address, and every one of them
  gets an error that names those that are missing.

  On a TPU pod, and where else JAX knows the cluster, it needs no arguments; the
  wait is bounded there, too, but the message is JAX's own.

  Examples:
    >>> import fsam_optax
    >>> fsam_optax.initialize_processes("127.0.0.1:8476", 2, 2)
    Traceback (most recent call last):
      ...
    ValueError: `process_id` must be in [0, 2), got 2. ...

  Args:
    coordinator_address: ``host:port`` of process 0, with a port that is free
      there, the same in every process. None to let JAX find the cluster.
    num_processes: number of processes of the job.
    process_id: which of them this is, from 0.
    timeout: seconds to wait for the others.
    heartbeat_timeout: seconds after which a process that says nothing counts as
      dead. One that fails waits as long for the dead ones before it exits.

  Raises:
    TypeError: if some of the first three arguments are given and others not, or
      one is of a wrong type.
    ValueError: if one is out of its range, or the processes do not agree: two
      have the same ``process_id``, or not all the same ``num_processes``.
    TimeoutError: if processes are missing when the time is up; names them.
    OSError: if process 0 cannot listen at the address.

  .. note::
    On the CPU, wait for each step, by :func:`jax.block_until_ready` or
    :func:`host_metrics`: with many steps in flight, the collectives of several
    processes of several devices can wait for each other forever.
  """
  _check_positive("timeout", timeout)
  _check_positive("heartbeat_timeout", heartbeat_timeout)
  arguments = (coordinator_address, num_processes, process_id)
  if any(x is not None for x in arguments):
    address = _check_job(coordinator_address, num_processes, process_id)
    deadline = time.monotonic() + timeout
    if process_id == 0:
      _count(address, num_processes, deadline, timeout)
    else:
      _report(address, num_processes, process_id, deadline, timeout)
  jax.distributed.initialize(
    coordinator_address,
    num_processes,
    process_id,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )


class Agreement:
  """Whether all processes feed the same shapes, and go on with them."""

  def __init__(self):
    """Starts before the first batch."""
    self._shapes = None

  def check(self, batch: Any) -> bool:
    """Compares a batch with the first, and that with those of the others.

    Args:
      batch: a tree of arrays.

    Returns:
      Whether this was the first one.

    Raises:
      ValueError: if the shapes differ between processes or from the first.
    """
    shapes = {
      name: f"{jax.numpy.result_type(x)}{list(np.shape(x))}"
      for name, x in _named(batch)
    }
    if self._shapes is None:
      _check_same_shapes(shapes)
      self._shapes = shapes
      return True
    if shapes != self._shapes:
      raise ValueError(
        f"`batch` must have the shapes of the first one, {self._shapes}, got "
        f"{shapes}. Drop or pad the last rows of an epoch; use a feeder of its "
        "own for evaluation."
      )
    return False


def check_same_values(state: Any) -> None:
  """Raises unless a tree holds the same values in every process.

  Args:
    state: a tree of arrays. Those that are on devices of several processes
      already are left out.

  Raises:
    ValueError: names an array that differs, and the processes.
  """
  digests = {}
  for name, x in _named(state):
    if isinstance(x, jax.Array):
      if not x.is_fully_addressable:
        continue
      if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    x = np.asarray(x)
    digests[name] = _digest(f"{x.dtype}{x.shape}".encode() + x.tobytes())
  # The first exchange has one size, whatever the trees are.
  names = _digest(str(list(digests)).encode())
  if different := _different(names):
    raise ValueError(
      "`state` must have the same structure in every process: that of "
      f"{different} differs from that of process 0."
    )
  if not digests or not _different(
    _digest(b"".join(x.tobytes() for x in digests.values()))
  ):
    return
  gathered = _gather(np.stack(list(digests.values())))
  for i, name in enumerate(digests):
    different = _list_processes((gathered[:, i] != gathered[0, i]).any(axis=1))
    if different:
      raise ValueError(
        "`state` must hold the same values in every process: that of "
        f"{different} differs from that of process 0 at {name}. Create it with "
        "the same seed everywhere, or restore the same checkpoint."
      )


def _check_same_shapes(shapes):
  if jax.process_count() == 1:
    return
  text = str(shapes).encode()
  buffer = np.zeros(_LONGEST, np.uint8)
  shown = np.frombuffer(text[:_LONGEST], np.uint8)
  buffer[: len(shown)] = shown
  gathered = _gather(np.concatenate([buffer, _digest(text)]))
  if (gathered != gathered[0]).any():
    got = "; ".join(
      f"process {i}: {bytes(row[row != 0]).decode(errors='replace')}"
      for i, row in enumerate(gathered[:, :_LONGEST])
    )
    raise ValueError(
      "`batch` must have the same shapes in every process, got "
      f"{got}. Give every process as many rows."
    )


def _named(tree):
  return [
    (jax.tree_util.keystr(path) or "the root", x)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  ]


def _digest(data: bytes) -> np.ndarray:
  return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def _gather(x: np.ndarray) -> np.ndarray:
  """The array of every process, with an axis over them in front."""
  return np.asarray(multihost_utils.process_allgather(x))


def _different(digest: np.ndarray) -> str:
  """The processes whose digest differs from that of process 0, or nothing."""
  gathered = _gather(digest)
  return _list_processes((gathered != gathered[0]).any(axis=1))


def _list_processes(are: np.ndarray) -> str:
  numbers = np.flatnonzero(are).tolist()
  plural = "processes" if len(numbers) > 1 else "process"
  return f"{plural} {', '.join(map(str, numbers))}" if numbers else ""


def _check_positive(name, value):
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(
      f"`{name}` must be a positive whole number of seconds, got {value!r}."
    )


def _check_job(coordinator_address, num_processes, process_id):
  """The host and the port, or an error."""
  given = {
    "coordinator_address": coordinator_address,
    "num_processes": num_processes,
    "process_id": process_id,
  }
  if absent := [f"`{name}`" for name, value in given.items() if value is None]:
    raise TypeError(
      "`coordinator_address`, `num_processes` and `process_id` must be given "
      f"together, got no {' and no '.join(absent)}. Give none of them on a "
      "cluster that JAX knows, such as a TPU pod."
    )
  for name in ("num_processes", "process_id"):
    if isinstance(given[name], bool) or not isinstance(given[name], int):
      raise TypeError(f"`{name}` must be an int, got {given[name]!r}.")
  if num_processes < 1:
    raise ValueError(
      f"`num_processes` must be at least 1, got {num_processes}."
    )
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f"`process_id` must be in [0, {num_processes}), got {process_id}. Count "
      "the processes from 0."
    )
  host, _, port = str(coordinator_address).rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      "`coordinator_address` must be of the form host:port, got "
      f"{coordinator_address!r}."
    )
  return host.strip("[]"), int(port)


def _count(address, num_processes, deadline, timeout):
  """Process 0: waits for a greeting of every other one, then answers all."""
  try:
    server = _listen(address)
  except OSError as error:
    raise OSError(
      error.errno,
      f"process 0 cannot listen at `coordinator_address` port {address[1]} "
      f"({error.strerror}). Choose a free port, or end the job that holds it.",
    ) from error
  with contextlib.ExitStack() as stack:
    stack.enter_context(server)
    came: dict[socket.socket, int] = {}
    waiting: set[socket.socket] = set()  # Connected, and silent so far.

    def answer(message):
      for connection in came:
        with contextlib.suppress(OSError):
          connection.sendall(f"{message}\n".encode())
      for connection in came:  # Whoever closes first keeps the port busy.
        with contextlib.suppress(OSError):
          connection.recv(1)

    while len(came) < num_processes - 1:
      left = deadline - time.monotonic()
      if left <= 0:
        missing = sorted(set(range(1, num_processes)) - set(came.values()))
        message = _missing(missing, num_processes, timeout)
        answer(message)
        raise TimeoutError(message)
      ready, _, _ = select.select([server, *came, *waiting], [], [], left)
      for source in ready:
        if source is server:
          connection, _ = server.accept()
          connection.settimeout(_SECONDS_TO_SPEAK)
          waiting.add(stack.enter_context(connection))
          continue
        numbers = _numbers(_receive(source))
        waiting.discard(source)
        if source in came or numbers is None:  # Gone away, or a stranger.
          came.pop(source, None)
          source.close()
          continue
        came[source], said = numbers
        if problem := _disagreement(list(came.values()), said, num_processes):
          answer(f"error {problem}")
          raise ValueError(problem)
    answer("go")


def _report(address, num_processes, process_id, deadline, timeout):
  """Another process: greets process 0 and waits for its answer."""
  nobody = (
    f"process 0 of {num_processes} is missing: nobody answered at "
    f"`coordinator_address` {address[0]}:{address[1]} for {timeout} s. "
    "Start it there, and let the port through."
  )
  greeting = f"{_GREETING} {process_id} {num_processes}\n".encode()
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection(address, timeout=left) as connection:
        connection.sendall(greeting)
        # Process 0 started later, perhaps, and waits as long.
        connection.settimeout(left + timeout)
        answer = _receive(connection)
    except OSError:
      answer = ""
    if answer == "go":
      return
    if answer.startswith("error "):
      raise ValueError(answer.removeprefix("error "))
    if answer:
      raise TimeoutError(answer)
    time.sleep(min(0.2, max(0, deadline - time.monotonic())))
  raise TimeoutError(nobody)


def _listen(address):
  host, port = address
  if ":" not in host and not socket.has_dualstack_ipv6():
    return socket.create_server(("", port))
  try:
    return socket.create_server(
      ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
    )
  except OSError as error:
    if ":" in host or error.errno == errno.EADDRINUSE:
      raise
    return socket.create_server(("", port))


def _receive(connection) -> str:
  """One line, or nothing where the other side went away."""
  line = b""
  with contextlib.suppress(OSError):
    while not line.endswith(b"\n") and len(line) < _LONGEST:
      received = connection.recv(_LONGEST)
      if not received:
        break
      line += received
  return line.decode(errors="replace").strip()


def _numbers(greeting) -> Optional[tuple[int, int]]:
  """The id and the number of processes that a greeting tells."""
  words = greeting.split()
  if len(words) != 3 or words[0] != _GREETING:
    return None
  if not words[1].isdecimal() or not words[2].isdecimal():
    return None
  return int(words[1]), int(words[2])


def _disagreement(came, said, num_processes):
  """What is wrong with the one who came last, or nothing."""
  last = came[-1]
  if said != num_processes:
    return (
      "`num_processes` must be the same in every process, got "
      f"{num_processes} in process 0 and {said} in process {last}."
    )
  if last == 0 or came.count(last) > 1:
    return (
      "`process_id` must differ between the processes, got "
      f"{last} in two of {num_processes}."
    )
  return None


def _missing(missing, num_processes, timeout):
  names = ", ".join(map(str, missing))
  plural = "processes" if len(missing) > 1 else "process"
  verb = "are" if len(missing) > 1 else "is"
  return (
    f"{plural} {names} of {num_processes} {verb} missing after {timeout} s. "
    "Look at what they printed, and start all of them again."
  )

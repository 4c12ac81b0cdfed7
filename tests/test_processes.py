"""The start of a job: every process hears who is missing, and nobody waits."""

import contextlib
import socket
import threading
import time

import jax
import pytest

import fsam_optax

SECONDS = 1


@pytest.fixture
def address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  return f"127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def joined(monkeypatch):
  """What would go to JAX, which joins a process for good."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda *args, **kwargs: calls.append(args)
  )
  return calls


def start(address, ids, num_processes=None, timeout=SECONDS):
  """What each process got, an error or None, in the order of the ids."""
  number = num_processes or len(ids)
  outcomes = [None] * len(ids)

  def run(position, process_id):
    said = number[position] if isinstance(number, list) else number
    try:
      fsam_optax.initialize_processes(
        address, said, process_id, timeout=timeout
      )
    except Exception as error:
      outcomes[position] = error

  threads = [threading.Thread(target=run, args=pair) for pair in enumerate(ids)]
  for thread in threads:
    thread.start()
    time.sleep(0.05)
  for thread in threads:
    thread.join()
  return outcomes


@pytest.mark.parametrize("ids", [[0], [0, 1], [3, 1, 2, 0]])
def test_all_are_counted_whoever_comes_first(ids, address, joined):
  assert start(address, ids, timeout=20) == [None] * len(ids)
  assert sorted(joined) == [(address, len(ids), i) for i in sorted(ids)]
  # The port is free again, for JAX.
  with socket.create_server(("", int(address.rpartition(":")[2]))):
    pass


def test_everyone_hears_who_is_missing(address, joined):
  begin = time.monotonic()
  for error in start(address, [0, 2], 4):
    assert isinstance(error, TimeoutError)
    assert "processes 1, 3 of 4 are missing after 1 s" in str(error)
  assert time.monotonic() - begin < 10
  assert not joined


def test_without_process_0_the_others_say_so(address):
  for error in start(address, [1, 2], 3):
    assert isinstance(error, TimeoutError)
    assert "process 0 of 3 is missing" in str(error)
    assert address in str(error)


def test_two_of_one_number_are_refused(address, joined):
  first, second, third = start(address, [0, 1, 1], 4, timeout=20)
  for error in (first, second, third):
    assert isinstance(error, ValueError)
    assert "`process_id` must differ" in str(error)
    assert "got 1 in two of 4" in str(error)
  assert not joined


def test_processes_that_count_differently_are_refused(address):
  for error in start(address, [0, 1], [2, 3], timeout=20):
    assert isinstance(error, ValueError)
    assert "2 in process 0 and 3 in process 1" in str(error)


def test_who_went_away_may_come_again_and_strangers_are_ignored(address):
  host, port = address.split(":")

  def disturb():
    for greeting in (b"fsam_optax 1 3\n", b"GET / HTTP/1.1\r\n\r\n", b""):
      with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), timeout=5) as connection,
      ):
        connection.sendall(greeting)
        if greeting == b"":
          time.sleep(1.5)  # Longer than anyone is listened to.

  timer = threading.Timer(0.1, disturb)
  timer.start()
  late = threading.Timer(
    0.5, lambda: outcomes.extend(start(address, [1, 2], 3, timeout=20))
  )
  outcomes = []
  late.start()
  assert start(address, [0], 3, timeout=20) == [None]
  late.join()
  timer.join()
  assert outcomes == [None, None]


def test_a_port_in_use_is_named(address):
  port = int(address.rpartition(":")[2])
  with socket.create_server(("", port)):
    (error,) = start(address, [0], 2)
  assert isinstance(error, OSError)
  assert f"port {port}" in str(error)
  assert "Choose a free port" in str(error)


def test_without_arguments_jax_finds_the_cluster(joined):
  fsam_optax.initialize_processes(timeout=5)
  assert joined == [(None, None, None)]


@pytest.mark.parametrize(
  ("args", "kwargs", "error", "message"),
  [
    (("127.0.0.1:1", 2), {}, TypeError, "got no `process_id`"),
    ((None, 2, 0), {}, TypeError, "got no `coordinator_address`"),
    (("127.0.0.1:1", "2", 0), {}, TypeError, "`num_processes` must be an int"),
    (("127.0.0.1:1", 2, 0.0), {}, TypeError, "`process_id` must be an int"),
    (("127.0.0.1:1", 0, 0), {}, ValueError, "must be at least 1, got 0"),
    (("127.0.0.1:1", 2, 2), {}, ValueError, r"in \[0, 2\), got 2"),
    (("127.0.0.1", 2, 0), {}, ValueError, "of the form host:port"),
    (("127.0.0.1:99999", 2, 0), {}, ValueError, "of the form host:port"),
    (("127.0.0.1:1", 2, 0), {"timeout": 0}, ValueError, "`timeout` must be"),
    (
      (),
      {"heartbeat_timeout": 1.5},
      ValueError,
      "`heartbeat_timeout` must be a positive whole number",
    ),
  ],
)
def test_bad_arguments_are_named(args, kwargs, error, message, joined):
  with pytest.raises(error, match=message):
    fsam_optax.initialize_processes(*args, **kwargs)
  assert not joined

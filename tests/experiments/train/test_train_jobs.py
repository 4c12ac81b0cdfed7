"""Real processes: a job equals one process, and goes on after a kill -9."""

import contextlib
import pathlib
import re
import resource
import signal
import socket
import time

import chex
import numpy as np
import pytest
import real_run
from real_run import checkpoint
from real_run import wait_for

pytestmark = pytest.mark.slow

# No BatchNorm, whose statistics a device by itself takes of its own rows; wide
# enough for FSDP to split its kernels. 10 steps an epoch.
FLAGS = (
  *("--model=mlp", "--depth=1", "--width=128", "--dtype=float64"),
  *("--epochs=2", "--batch-size=128", "--log-every=1"),
)
STEPS = 20


def free_address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def start_job(start, words, others=None):
  """Two processes, each with an output and flags, which may differ."""
  job = f"--coordinator-address={free_address()}", "--num-processes=2"
  return [
    start(*mine, *job, f"--process-id={i}")
    for i, mine in enumerate((words, others or words))
  ]


def finish(job, status=0):
  """What each process printed, of which all end by themselves."""
  return [real_run.finish(process, status) for process in job]


@pytest.fixture(scope="module", name="one_process")
def fixture_one_process(tmp_path_factory, start):
  output = tmp_path_factory.mktemp("one") / "run"
  real_run.finish(start(output, "--cpu-devices=1"))
  return output


def kill(job):
  """One of them, and the other as whoever starts the processes does."""
  job[1].kill()
  with contextlib.suppress(ProcessLookupError):
    job[0].kill()
  for process in job:
    process.communicate()


def fill_the_disk(job):
  """For one of them, after which both say so and end by themselves."""
  # No file of its may grow any more.
  resource.prlimit(job[1].pid, resource.RLIMIT_FSIZE, (0, 0))
  for printed in finish(job, status=1):
    assert "a checkpoint cannot be written to" in printed
    assert "in process 1: " in printed


def assert_close(output, one_process):
  expected = real_run.arrays(one_process, STEPS)
  found = real_run.arrays(output, STEPS)
  del expected["['checksum']"], found["['checksum']"]
  chex.assert_trees_all_close(found, expected, rtol=1e-9, atol=1e-11)
  for mine, other in zip(
    real_run.lines(output), real_run.lines(one_process), strict=True
  ):
    assert mine.pop("kind") == other.pop("kind")
    assert mine == pytest.approx(other, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize(
  ("sharding", "end"), [("fsdp", kill), ("replicated", fill_the_disk)]
)
def test_a_job_equals_one_process_also_when_one_of_it_fell(
  sharding, end, one_process, start, tmp_path
):
  flags = ("--save-every=4", "--cpu-devices=2", f"--sharding={sharding}")
  unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
  first, other = finish(start_job(start, (unbroken, *flags)))
  assert f"from batch 0 of {STEPS}, on 4 devices" in first
  assert "from batch" not in other
  assert_close(unbroken, one_process)
  job = start_job(start, (broken, *flags))
  wait_for(checkpoint(broken, 8), job[0])
  end(job)
  job = start_job(start, (broken, *flags))
  # Nobody reads the streams any more, as by ``2>&1 | head``.
  begin = job[0].stdout.readline()
  while "from batch" not in begin:
    begin = job[0].stdout.readline()
  for process in job:
    process.stdout.close()
  for process in job:
    assert process.wait(timeout=real_run.SECONDS) == 0
  begin = int(re.search(r"from batch (\d+) of", begin)[1])
  assert 4 <= begin < STEPS
  real_run.assert_same(broken, unbroken, STEPS)


def test_a_process_that_waits_in_vain_ends_and_has_said_where(start, tmp_path):
  address = free_address()
  job = (f"--coordinator-address={address}", "--num-processes=2")
  process = start(tmp_path / "run", *job, "--process-id=0", "--timeout=2")
  # 127.0.0.1 alone, also as an address of IPv6.
  deadline, found = time.monotonic() + 60, []
  while not found and time.monotonic() < deadline and process.poll() is None:
    found = listening(int(address.rpartition(":")[2]))
  assert {x[-8:] for x in found} == {"0100007F"}
  printed, _ = process.communicate(timeout=60)
  assert process.returncode != 0
  assert f"of 2: waiting for the others, up to 2 s, at {address}" in printed
  assert "DEADLINE_EXCEEDED" in printed


def listening(port):
  """The local addresses at which somebody listens to a port, in hexadecimal."""
  found = []
  for name in ("tcp", "tcp6"):
    for line in pathlib.Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
      fields = line.split()
      address, _, at = fields[1].rpartition(":")
      if int(at, 16) == port and fields[3] == "0A":
        found.append(address)
  return found


def errors(job):
  """The line with the error of each process, which has no traceback."""
  for printed in finish(job, status=1):
    (line,) = [x for x in printed.splitlines() if "error:" in x]
    assert "Traceback" not in printed
    yield line


def test_processes_that_differ_are_told_in_what(start, digits, tmp_path):
  """Flags and data, devices, and whether they see the folder."""
  output, other = tmp_path / "run", tmp_path / "other.npz"
  with np.load(digits) as arrays:
    np.savez(other, **{**arrays, "x_train": arrays["x_train"][::-1]})
  more = ("--rho=0.3", "--save-every=7", f"--data={other}")
  for line in errors(start_job(start, (output, "--rho=0.2"), (output, *more))):
    assert "--rho 0.2 in process 0 and 0.3 in process 1" in line
    assert "--save-every none in process 0 and 7 in process 1" in line
    assert "--data (SHA-256)" in line
  two, one = ((output, f"--cpu-devices={number}") for number in (2, 1))
  for line in errors(start_job(start, two, one)):
    assert "of devices, got 2, 1" in line
  mine, yours = (tmp_path / "mine",), (tmp_path / "yours",)
  for line in errors(start_job(start, mine, yours)):
    assert "--output must be one folder that every process sees" in line
    assert "process 1 does not see" in line
  assert not list(tmp_path.glob("*/seed-*"))


def test_a_job_that_is_interrupted_in_its_second_seed_saves(start, tmp_path):
  output = tmp_path / "run"
  flags = ("--save-every=2", "--seeds=500", "--epochs=1")
  job = start_job(start, (output, *flags))
  wait_for(output / "seed-2" / "checkpoints" / "4", job[0])
  job[0].send_signal(signal.SIGINT)
  printed = [
    real_run.finish(process, status)
    for process, status in zip(job, (130, 0), strict=True)
  ]
  ends = [re.search(r"saved after batch \d+", text)[0] for text in printed]
  assert ends[0] == ends[1]
  assert not any("Traceback" in text for text in printed)

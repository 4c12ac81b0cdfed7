"""Real processes: a job equals one process, and goes on after a kill -9."""

import os
import re
import signal
import socket
import time

import numpy as np
import pytest
import real_run
from real_run import checkpoint
from real_run import wait_for

pytestmark = pytest.mark.slow

# No BatchNorm, whose statistics a device by itself takes of its own rows; wide
# enough for FSDP to split its kernels. 10 steps an epoch.
FLAGS = (
  "--model=cnn",
  "--width=32",
  "--epochs=2",
  "--batch-size=128",
  "--drop-last",
  "--log-every=1",
)
STEPS = 20


@pytest.fixture(scope="module", name="environment")
def fixture_environment(tmp_path_factory):
  return real_run.environment(tmp_path_factory)


@pytest.fixture(scope="module", name="command")
def fixture_command(tmp_path_factory):
  data = tmp_path_factory.mktemp("data") / "digits.npz"
  real_run.write_digits(data)

  def command(output, processes, *flags, devices=4):
    job = [f"--cpu-devices={devices // processes}"]
    if processes > 1:
      job.append(f"--launch={processes}")
    return real_run.command(output, data, *FLAGS, *job, *flags)

  return command


@pytest.fixture(scope="module", name="start")
def fixture_start(environment, command):
  with real_run.processes(environment) as start:
    yield lambda *args, **kwargs: start(command(*args, **kwargs))


@pytest.fixture(scope="module", name="one_process")
def fixture_one_process(tmp_path_factory, start):
  output = tmp_path_factory.mktemp("one") / "run"
  real_run.finish(start(output, 1, "--dtype=float64", devices=1))
  return output


@pytest.mark.parametrize(
  ("processes", "sharding", "devices"),
  [
    (2, "replicated", 4),
    (4, "replicated", 8),
    (2, "fsdp", 4),
    (4, "shard_map", 4),
  ],
)
def test_a_job_equals_one_process(
  processes, sharding, devices, one_process, start, tmp_path
):
  output = tmp_path / "run"
  flags = ("--dtype=float64", f"--sharding={sharding}")
  job = start(output, processes, *flags, devices=devices)
  printed = real_run.finish(job)
  assert f"from batch 0 of {STEPS}, on {devices} devices" in printed
  expected = real_run.arrays(one_process, STEPS)
  found = real_run.arrays(output, STEPS)
  del expected["['checksum']"], found["['checksum']"]
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_allclose(
      found[name], array, rtol=1e-9, atol=1e-11, err_msg=name
    )
  for mine, other in zip(
    real_run.lines(output), real_run.lines(one_process), strict=True
  ):
    assert mine.pop("kind") == other.pop("kind")
    assert mine == pytest.approx(other, rel=1e-9, abs=1e-11)


def test_a_job_that_is_told_to_end_saves_and_leaves_no_process(start, tmp_path):
  output = tmp_path / "run"
  job = start(output, 2, "--save-every=2", "--epochs=1000")
  pids = [int(pid) for pid in re.findall(r"\d+", job.stdout.readline())]
  assert len(pids) == 2
  wait_for(checkpoint(output, 2), job)
  job.terminate()
  assert "told to end; saved after batch" in real_run.finish(job)
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize(
  "flags",
  [
    ("--sharding=replicated", "--model=wide_resnet", "--depth=10", "--width=1"),
    (
      "--sharding=shard_map",
      "--no-sync-perturbation",
      "--ema-gradient=descent",
    ),
  ],
  ids=["replicated", "lean"],
)
def test_a_job_of_which_one_was_killed_goes_on_as_the_unbroken_one(
  flags, start, tmp_path
):
  flags = (2, "--save-every=4", *flags)
  unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
  real_run.finish(start(unbroken, *flags))
  job = start(broken, *flags)
  victim = int(re.findall(r"\d+", job.stdout.readline())[1])
  wait_for(checkpoint(broken, 8), job)
  os.kill(victim, signal.SIGKILL)
  printed = real_run.finish(job, status=1)
  assert "process 1 ended by SIGKILL; ending the others" in printed

  printed = real_run.finish(start(broken, *flags))
  begin = int(re.search(r"from batch (\d+) of", printed)[1])
  assert 4 <= begin < STEPS
  assert real_run.lines(broken) == real_run.lines(unbroken)
  expected = real_run.arrays(unbroken, STEPS)
  found = real_run.arrays(broken, STEPS)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def free_address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_process_that_waits_in_vain_ends_and_has_said_where(start, tmp_path):
  address = free_address()
  begin = time.monotonic()
  process = start(
    tmp_path / "run",
    1,
    f"--coordinator-address={address}",
    "--num-processes=2",
    "--process-id=0",
    "--timeout=2",
  )
  printed, _ = process.communicate(timeout=60)
  assert process.returncode != 0
  assert time.monotonic() - begin < 60
  assert f"of 2: waiting for the others, up to 2 s, at {address}" in printed
  assert "DEADLINE_EXCEEDED" in printed

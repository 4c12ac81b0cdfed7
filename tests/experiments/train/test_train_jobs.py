"""Real processes: a job equals one process, and goes on after a kill -9."""

import os
import pathlib
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
  "--model=mlp",
  "--depth=1",
  "--width=128",
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


@pytest.mark.parametrize(
  "flags",
  [
    ("--sharding=fsdp",),
    (
      "--sharding=shard_map",
      "--no-sync-perturbation",
      "--ema-gradient=descent",
    ),
  ],
  ids=["fsdp", "lean"],
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


# Processes that do not agree, and what a job listens to.


def job_of(start, outputs, flags=((), ()), data=(None, None), **kwargs):
  """Two processes, each with a folder and flags of its own."""
  address = free_address()
  return [
    start(
      outputs[i],
      1,
      f"--coordinator-address={address}",
      "--num-processes=2",
      f"--process-id={i}",
      "--timeout=60",
      *(() if data[i] is None else (f"--data={data[i]}",)),
      *flags[i],
      devices=2,
      **kwargs,
    )
    for i in range(2)
  ]


def ends(job, status=1):
  """What both processes printed, which end by themselves."""
  begin = time.monotonic()
  printed = [real_run.finish(process, status=status) for process in job]
  assert time.monotonic() - begin < 90
  return printed


def test_processes_of_other_flags_or_data_are_told_which(start, tmp_path):
  output = tmp_path / "run"
  other = tmp_path / "other.npz"
  real_run.write_digits(other)
  with np.load(other) as arrays:
    changed = dict(arrays)
  changed["x_train"] = changed["x_train"][::-1]
  np.savez(other, **changed)
  flags = (("--rho=0.2",), ("--rho=0.3", "--save-every=7"))
  job = job_of(start, (output, output), flags, data=(None, other))
  for printed in ends(job):
    (line,) = [x for x in printed.splitlines() if "error:" in x]
    assert "--rho 0.2 in process 0 and 0.3 in process 1" in line
    assert "--save-every null in process 0 and 7 in process 1" in line
    assert "--data (SHA-256)" in line
    assert "Traceback" not in printed
  assert not list(output.glob("seed-*"))


def test_a_folder_that_not_all_see_is_refused_before_training(start, tmp_path):
  outputs = tmp_path / "mine", tmp_path / "yours"
  job = job_of(start, outputs)
  for printed in ends(job):
    assert "--output must be one folder that every process sees" in printed
    assert "process 1 does not see" in printed
    assert "Traceback" not in printed
  assert not list(tmp_path.glob("*/seed-*"))


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


def test_the_coordinator_listens_at_its_address_alone(start, tmp_path):
  address = free_address()
  process = start(
    tmp_path / "run",
    1,
    f"--coordinator-address={address}",
    "--num-processes=2",
    "--process-id=0",
    "--timeout=20",
  )
  deadline, found = time.monotonic() + 60, []
  while not found and time.monotonic() < deadline:
    found = listening(int(address.rpartition(":")[2]))
    time.sleep(0.05)
  process.kill()
  # 127.0.0.1, also as an address of IPv6.
  assert found
  assert {x[-8:] for x in found} == {"0100007F"}


def test_a_job_that_is_interrupted_saves_and_says_so(start, tmp_path):
  output = tmp_path / "run"
  job = start(output, 2, "--save-every=2", "--epochs=1000")
  pids = [int(pid) for pid in re.findall(r"\d+", job.stdout.readline())]
  wait_for(checkpoint(output, 2), job)
  begin = time.monotonic()
  # As a terminal sends it, to all of them.
  for pid in (*pids, job.pid):
    os.kill(pid, signal.SIGINT)
  printed = real_run.finish(job, status=130)
  assert "told to end; saved after batch" in printed
  assert "Traceback" not in printed
  assert time.monotonic() - begin < 30


def test_sigterm_in_the_second_seed_saves_and_leaves_no_process(
  start, tmp_path
):
  output = tmp_path / "run"
  job = start(output, 2, "--save-every=2", "--seeds=500", "--epochs=1")
  pids = [int(pid) for pid in re.findall(r"\d+", job.stdout.readline())]
  assert len(pids) == 2
  second = output / "seed-2" / "checkpoints" / "4"
  wait_for(second, job)
  job.terminate()
  assert "told to end; saved after batch" in real_run.finish(job)
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


def test_a_reader_who_goes_away_ends_no_job(start, tmp_path):
  """Both streams of all processes are closed, as by ``2>&1 | head``."""
  output = tmp_path / "run"
  job = start(output, 2)
  job.stdout.readline()
  job.stdout.close()
  assert job.wait(timeout=real_run.SECONDS) == 0
  assert (output / "summary.json").exists()

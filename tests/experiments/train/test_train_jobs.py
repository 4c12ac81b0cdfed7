"""Real processes: a job equals one process, and goes on after a kill -9."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "data_parallel.py"
STEPS, SAVE_EVERY = 24, 4
SECONDS = 300


def command(directory, processes, how, *flags, devices=4):
  # The digits have 800 training rows: 8 steps an epoch.
  return [
    sys.executable,
    str(SCRIPT),
    str(directory),
    f"--how={how}",
    f"--cpu-devices={devices // processes}",
    "--data=digits",
    "--epochs=3",
    "--batch-size=96",
    f"--save-every={SAVE_EVERY}",
    f"--output={directory}.npz",
    *([f"--launch={processes}"] if processes > 1 else []),
    *flags,
  ]


def finish(directory, *args, **kwargs):
  """Runs a job to its end. What it printed, and its final arrays."""
  done = subprocess.run(
    command(directory, *args, **kwargs),
    capture_output=True,
    text=True,
    timeout=SECONDS,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  with np.load(f"{directory}.npz") as arrays:
    return done.stdout, dict(arrays)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
  directory = tmp_path_factory.mktemp("one") / "run"
  return finish(directory, 1, "jit", "--double")[1]


@pytest.mark.parametrize(
  ("processes", "how", "devices"),
  [(2, "jit", 4), (4, "jit", 8), (4, "pmap", 4), (2, "fsdp", 4)],
)
def test_a_job_equals_one_process(
  processes, how, devices, one_process, tmp_path
):
  # Saved at its end alone: nothing else makes it wait between the steps.
  flags = ("--double", "--save-every=1000")
  printed, arrays = finish(
    tmp_path / "run", processes, how, *flags, devices=devices
  )
  assert f"step 0 of {STEPS}, {devices} devices" in printed
  assert arrays.keys() == one_process.keys()
  assert arrays["step"] == STEPS
  for name, expected in one_process.items():
    np.testing.assert_allclose(
      arrays[name], expected, rtol=1e-10, atol=1e-12, err_msg=name
    )


def test_a_job_that_is_told_to_end_leaves_no_process(tmp_path):
  with subprocess.Popen(
    command(tmp_path / "run", 2, "jit"),
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  ) as job:
    pids = [int(pid) for pid in re.findall(r"\d+", job.stdout.readline())]
    job.terminate()
    assert job.wait(timeout=30) == 128 + signal.SIGTERM
  assert len(pids) == 2
  for pid in pids:
    with pytest.raises(ProcessLookupError):
      os.kill(pid, 0)


@pytest.mark.parametrize(
  ("how", "mode", "model"),
  [("jit", "default", "mlp"), ("pmap", "lean", "resnet")],
)
def test_a_job_of_which_one_was_killed_goes_on_as_the_unbroken_one(
  how, mode, model, tmp_path
):
  flags = (2, how, f"--mode={mode}", f"--model={model}")
  _, unbroken = finish(tmp_path / "unbroken", *flags)
  broken = tmp_path / "broken"
  job = subprocess.Popen(
    command(broken, *flags),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  victim = int(re.findall(r"\d+", job.stdout.readline())[1])
  deadline = time.monotonic() + SECONDS
  saved = broken / str(2 * SAVE_EVERY)
  while not saved.exists() and time.monotonic() < deadline:
    assert job.poll() is None, job.stdout.read()
    time.sleep(0.01)
  os.kill(victim, signal.SIGKILL)
  printed, _ = job.communicate(timeout=60)
  assert job.returncode == 1
  assert "process 1 ended by SIGKILL; ending the others" in printed
  assert not pathlib.Path(f"{broken}.npz").exists()

  printed, resumed = finish(broken, *flags)
  start = int(re.search(r"step (\d+) of", printed)[1])
  assert SAVE_EVERY <= start < STEPS
  for name, expected in unbroken.items():
    np.testing.assert_array_equal(resumed[name], expected, err_msg=name)


def free_address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_a_process_that_waits_in_vain_says_for_whom(tmp_path):
  done = subprocess.run(
    [
      *command(tmp_path / "run", 1, "jit"),
      f"--coordinator-address={free_address()}",
      "--num-processes=2",
      "--process-id=0",
      "--timeout=2",
    ],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 1
  assert "process 1 of 2 is missing after 2 s" in done.stderr


def test_processes_that_disagree_get_an_error_each():
  script = pathlib.Path(__file__).with_name("disagreeing_process.py")
  address = free_address()
  processes = [
    subprocess.Popen(
      [sys.executable, str(script), address, str(i)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    shapes = re.search(r"shapes: (.*)", printed)[1]
    assert "process 0: {\"['x']\": 'float32[4, 3]'}" in shapes
    assert "process 1: {\"['x']\": 'float32[6, 3]'}" in shapes
    values = re.search(r"values: (.*)", printed)[1]
    assert "process 1 differs from that of process 0 at .params['w']" in values
    structure = re.search(r"structure: (.*)", printed)[1]
    assert "that of process 1 differs from that of process 0" in structure
    assert "process 1: {'the root': 'float32[2, 3, 3]'}" in printed
    assert "evenly over 4 devices or groups, got 6 rows" in printed
    assert "{'w': 21.0}" in printed

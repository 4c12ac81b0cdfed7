"""Real processes of ``train``: how they are started, and what they leave."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from fsam_optax.experiments import data

SECONDS = 300
TIMES = ("seconds", "images_per_second", "waiting_fraction")


def environment(tmp_path_factory):
  """Programs are compiled once, and read from there by the later processes."""
  compiled = tmp_path_factory.getbasetemp().parent / "compiled"
  return {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(compiled),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }


def write_digits(path):
  """The digits of scikit-learn, which takes long to import, as arrays."""
  digits = data.load("digits")
  names = ("x_train", "y_train", "x_test", "y_test")
  np.savez(path, **{name: getattr(digits, name) for name in names})


@contextlib.contextmanager
def processes(environment):
  """A function that starts a command, and kills what a failed test left."""
  started = []

  def start(command):
    # A process inherits what its parent ignores: a hangup by nohup, an
    # interrupt in a shell's background. Not by preexec_fn: that forks, of which
    # JAX warns.
    numbers = (signal.SIGHUP, signal.SIGINT)
    inherited = [signal.signal(x, signal.SIG_DFL) for x in numbers]
    try:
      process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
      )
    finally:
      for number, handler in zip(numbers, inherited, strict=True):
        signal.signal(number, handler)
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()


def command(output, *flags):
  """``python -m fsam_optax train`` with these flags."""
  train = (sys.executable, "-m", "fsam_optax", "train")
  return [*train, f"--output={output}", *flags]


def free_address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    return f"127.0.0.1:{server.getsockname()[1]}"


def start_job(start, number, *flags):
  """The processes of a job, each with the same flags."""
  address = free_address()
  job = [f"--coordinator-address={address}", f"--num-processes={number}"]
  return [start(*flags, *job, f"--process-id={i}") for i in range(number)]


def finish(process, status=0):
  """Waits for the end; what was printed."""
  printed, _ = process.communicate(timeout=SECONDS)
  assert process.returncode == status, printed
  return printed


def wait_for(path, process):
  """Waits until a path is there."""
  deadline = time.monotonic() + SECONDS
  while not path.exists() and time.monotonic() < deadline:
    assert process.poll() is None, process.stdout.read()
    time.sleep(0.01)


def checkpoint(output, batches):
  """The folder of a checkpoint."""
  return output / "seed-1" / "checkpoints" / str(batches)


def checkpoints(output):
  """The numbers of all checkpoints."""
  folder = output / "seed-1" / "checkpoints"
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def lines(output):
  """The metrics but for the clock's."""
  text = (output / "seed-1" / "metrics.jsonl").read_text()
  parsed = [json.loads(line) for line in text.splitlines()]
  return [{k: v for k, v in x.items() if k not in TIMES} for x in parsed]


def arrays(output, batches):
  """The arrays of a checkpoint by name, whatever they were sharded over."""
  path = (checkpoint(output, batches) / "progress").absolute()
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree
    as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    tree = checkpointer.restore(
      path, restore_args=jax.tree.map(as_numpy, metadata)
    )
  is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
  return {
    jax.tree_util.keystr(path): np.asarray(
      jax.random.key_data(x) if is_key(x) else x
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(output, unbroken, batches, least=50):
  """Asserts that two runs left the same lines and the same bits."""
  assert lines(output) == lines(unbroken)
  expected, found = arrays(unbroken, batches), arrays(output, batches)
  assert len(expected) > least
  assert expected.keys() == found.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)

"""Two real processes that disagree: both hear of it, and neither waits."""

import socket
import subprocess
import sys

from faces import state_of
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import pytest

import fsam_optax
from fsam_optax import sharding

pytestmark = pytest.mark.slow


def create_state(seed):
  params = {"a": jnp.zeros(3), "w": jnp.full(3, float(seed))}
  ascent = fsam_optax.friendly_perturbation()
  return state_of(params, ascent, rng=jax.random.key(0))


def report(what, call):
  try:
    call()
  except ValueError as error:
    print(f"{what}: {error}", flush=True)


def main(address, process_id):
  """One of the two processes; it prints the errors that it gets."""
  jax.config.update("jax_num_cpu_devices", 2)
  jax.distributed.initialize(address, 2, process_id)
  mesh = make_mesh(batch=4)
  feed = sharding.BatchFeeder(mesh)
  rows = lambda number: np.zeros((number, 3), np.float32)
  report("shapes", lambda: feed({"x": rows(4 + 2 * process_id)}))
  report("values", lambda: sharding.place_state(create_state(process_id), mesh))
  report(
    "structure", lambda: sharding.place_state([0] * (1 + process_id), mesh)
  )
  report("rows", lambda: sharding.BatchFeeder(mesh)(rows(3)))
  report("shared", lambda: sharding.BatchFeeder(make_mesh(model=2, batch=2)))
  # They still hear each other.
  state = sharding.place_state(create_state(7), mesh)
  print({"w": np.asarray(jnp.sum(state.params["w"])).item()}, flush=True)


def test_processes_that_disagree_get_an_error_each():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  processes = [
    subprocess.Popen(
      [sys.executable, __file__, address, str(i)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  for process in processes:
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    for sentence in (
      "at ['x'] float32[6, 3] in process 1 for float32[4, 3] in process 0",
      "got at .params['w'] float32[3], digest",
      "got at [1] int32[], digest",
      "in process 1 for nothing in process 0",
      "evenly over 4 devices or groups, got 6 rows",
      "Drop 2 of them, or add 2.",
      "shared: `mesh` must give every process rows of its own",
      "{'w': 21.0}",
    ):
      assert sentence in printed


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))

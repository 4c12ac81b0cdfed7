"""One of two processes that disagree, and print the errors that they get."""

import sys

import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax

import fsam_optax
from fsam_optax import sharding


def create_state(seed):
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params={"a": jnp.zeros(3), "w": jnp.full(3, float(seed))},
    tx=optax.sgd(0.1),
    perturbation=fsam_optax.friendly_perturbation(),
    rng=jax.random.key(0),
  )


def report(what, call):
  try:
    call()
  except ValueError as error:
    print(f"{what}: {error}", flush=True)


def main(address, process_id):
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
  # They still hear each other.
  state = sharding.place_state(create_state(7), mesh)
  print({"w": np.asarray(jnp.sum(state.params["w"])).item()}, flush=True)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))

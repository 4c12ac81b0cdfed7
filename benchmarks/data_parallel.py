"""Trains F-SAM on many devices and processes, and survives their end.

The same script runs on a laptop and, once a host, on a pod. It goes on from the
last checkpoint in its directory, so that a job that was killed is started again
with the same command. Here, on the CPU, with four processes of two devices:

  python benchmarks/data_parallel.py runs/mnist --launch 4 --cpu-devices 2

One process at a time, on machines of one's own:

  python benchmarks/data_parallel.py runs/mnist \\
    --coordinator-address HOST:8476 --num-processes 4 --process-id 0

On every host of a TPU pod, with a directory that all of them see:

  python benchmarks/data_parallel.py /mnt/shared/mnist --distributed
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

from flax import jax_utils
import jax
from jax import numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import fsam_optax
from fsam_optax.experiments import data
from fsam_optax.experiments import models
from fsam_optax.experiments import resnet

MODES: dict[str, dict[str, Any]] = {
  "default": {},
  "local": {"sync_perturbation": False},
  "lean": {"sync_perturbation": False, "ema_gradient": "descent"},
}
LEARNING_RATE, RHO = 0.02, 0.5  # Of `python -m fsam_optax compare`.
SEED = 0


def flags() -> argparse.ArgumentParser:
  """The command line."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("directory", help="for checkpoints; all processes see it")
  job = parser.add_argument_group("processes")
  job.add_argument("--launch", type=int, help="start so many, here")
  job.add_argument("--distributed", action="store_true", help="as on a TPU pod")
  job.add_argument("--coordinator-address", help="host:port of process 0")
  job.add_argument("--num-processes", type=int)
  job.add_argument("--process-id", type=int)
  job.add_argument("--timeout", type=int, default=300, help="of the start, s")
  job.add_argument("--cpu-devices", type=int, help="a process, on the CPU")
  parser.add_argument(
    "--how", choices=("jit", "fsdp", "shard_map", "pmap"), default="jit"
  )
  parser.add_argument("--mode", choices=MODES, default="default")
  parser.add_argument(
    "--data", default="mnist", help="mnist, digits or an .npz"
  )
  parser.add_argument(
    "--model", choices=("mlp", "cnn", "resnet"), default="mlp"
  )
  parser.add_argument("--label-noise", type=float, default=0.4)
  parser.add_argument("--epochs", type=int, default=60)
  parser.add_argument("--batch-size", type=int, default=96, help="of all rows")
  parser.add_argument("--save-every", type=int, default=100, help="steps")
  parser.add_argument(
    "--double", action="store_true", help="compute in float64"
  )
  parser.add_argument("--output", help="write the final arrays to this .npz")
  return parser


def launch(number: int, argv: list[str]) -> int:
  """Starts the processes of a job here, and ends all when one fails."""
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  processes: list[subprocess.Popen] = []
  try:
    for i in range(number):
      job = [
        f"--coordinator-address=127.0.0.1:{port}",
        f"--num-processes={number}",
        f"--process-id={i}",
      ]
      processes.append(subprocess.Popen([sys.executable, *argv, *job]))
    print("processes", *(p.pid for p in processes), flush=True)
    while True:
      codes = [p.poll() for p in processes]
      if failed := {i: code for i, code in enumerate(codes) if code}:
        for i, code in failed.items():
          how = (
            f"by {signal.Signals(-code).name}" if code < 0 else f"with {code}"
          )
          print(f"process {i} ended {how}; ending the others", file=sys.stderr)
        return 1
      if codes.count(0) == number:
        return 0
      time.sleep(0.1)
  finally:
    for p in processes:
      p.kill()
      p.wait()


def network_of(args, pool: data.Pool):
  """The initial variables, and the loss of a batch."""
  if args.model == "resnet":
    network = resnet.ResNet(pool.classes, width=8, blocks=(1, 1))
    images = lambda x: x[..., None] if x.ndim == 3 else x
    training, testing = {"train": True}, {"train": False}
  else:
    network = models.create(args.model, pool.classes)
    images = lambda x: x
    training = testing = {}
  row = images(jnp.asarray(pool.x[:1], jnp.float32))
  variables = dict(network.init(jax.random.key(SEED), row, **testing))
  if args.double:
    variables = jax.tree.map(lambda x: x.astype(jnp.float64), variables)

  def loss_fn(params, model_state, batch, rng):
    del rng
    variables = {"params": params, **model_state}
    logits, model_state = network.apply(
      variables, images(batch["x"]), mutable=["batch_stats"], **training
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    hits = jnp.argmax(logits, axis=-1) == batch["y"]
    metrics = {"accuracy": jnp.mean(hits, dtype=losses.dtype)}
    return losses.mean(), (dict(model_state), metrics)

  def hits(state, batch):
    logits = network.apply(
      {"params": state.params, **state.model_state},
      images(batch["x"]),
      **testing,
    )
    return jnp.sum(jnp.argmax(logits, axis=-1) == batch["y"])

  return variables, loss_fn, hits


def train(args) -> None:
  """Trains from the last checkpoint to the end."""
  pool = data.load(args.data)
  splits = data.split(pool, [SEED], args.label_noise)
  dtype = np.float64 if args.double else np.float32
  normalise = lambda rows: (
    (pool.x[rows] - splits.mean[0]) / splits.deviation[0]
  ).astype(dtype)
  x, y = normalise(splits.train_rows[0]), splits.train_labels[0]

  mesh = fsam_optax.make_mesh()
  variables, loss_fn, hits = network_of(args, pool)
  steps_an_epoch = len(y) // max(1, args.batch_size)
  steps = args.epochs * steps_an_epoch
  if steps < 1 or args.batch_size < 1:
    raise SystemExit(
      f"--epochs must be positive and --batch-size in [1, {len(y)}], the "
      f"training rows, got {args.epochs} and {args.batch_size}"
    )
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params=variables.pop("params"),
    tx=optax.chain(
      optax.add_decayed_weights(5e-4),
      optax.sgd(
        optax.cosine_decay_schedule(LEARNING_RATE, steps), momentum=0.9
      ),
    ),
    perturbation=fsam_optax.friendly_perturbation(RHO),
    model_state=variables,
    rng=jax.random.key(SEED + 1),
  )
  rule = (
    fsam_optax.fsdp_rule(mesh, min_size=512) if args.how == "fsdp" else None
  )
  state = fsam_optax.place_state(state, mesh, rule)
  options = MODES[args.mode]
  if args.how in ("jit", "fsdp"):
    if options:
      raise SystemExit(f"--mode {args.mode} needs an axis: --how shard_map")
    step = fsam_optax.jit_step(
      fsam_optax.make_train_step(loss_fn, jit=False), state
    )
  else:
    step = fsam_optax.make_train_step(
      loss_fn, axis_name="batch", jit=False, **options
    )
    if args.how == "shard_map":
      step = fsam_optax.shard_map_step(step, mesh)
    else:
      step = fsam_optax.pmap_step(step)

  with ocp.CheckpointManager(
    os.path.abspath(args.directory)
    if "://" not in args.directory
    else args.directory,
    options=ocp.CheckpointManagerOptions(max_to_keep=2),
    item_handlers=ocp.StandardCheckpointHandler(),
  ) as manager:
    if (last := manager.latest_step()) is not None:
      fsam_optax.check_checkpoint(manager.item_metadata(last), state)
      state = manager.restore(last, args=ocp.args.StandardRestore(state))
    done = int(state.step)
    report(f"step {done} of {steps}, {jax.device_count()} devices")
    if args.how == "pmap":
      # This process's copy of the state, once more on each of its devices.
      state = jax_utils.replicate(
        jax.tree.map(lambda x: x.addressable_data(0), state)
      )
      feed = lambda batch: batch
    else:
      feed = fsam_optax.BatchFeeder(mesh)
    mine = slice(
      jax.process_index() * args.batch_size // jax.process_count(),
      (jax.process_index() + 1) * args.batch_size // jax.process_count(),
    )
    for number in range(done, steps):
      epoch, position = divmod(number, steps_an_epoch)
      # Of the seed and the epoch alone: a resumed run sees the same batches.
      order = np.random.default_rng((SEED, epoch)).permutation(len(y))
      start = position * args.batch_size
      rows = order[start : start + args.batch_size][mine]
      state, metrics = step(state, feed({"x": x[rows], "y": y[rows]}))
      if jax.default_backend() == "cpu":
        # Steps in flight share few threads, and their collectives may wait
        # for each other forever.
        jax.block_until_ready(state)
      if (number + 1) % args.save_every == 0 or number + 1 == steps:
        placed = state
        if args.how == "pmap":
          placed = fsam_optax.place_state(jax_utils.unreplicate(state), mesh)
        manager.save(number + 1, args=ocp.args.StandardSave(placed))
        numbers = fsam_optax.host_metrics(metrics)
        report(json.dumps({"step": number + 1, **numbers}))
    manager.wait_until_finished()
  if args.how == "pmap":
    state = fsam_optax.place_state(jax_utils.unreplicate(state), mesh)
  test = {"x": normalise(splits.test_rows[0]), "y": pool.y[splits.test_rows[0]]}
  found = jax.jit(hits, out_shardings=fsam_optax.state_shardings(0, mesh))(
    state, fsam_optax.place_state(test, mesh)
  )
  accuracy = fsam_optax.host_metrics({"hits": found})["hits"] / len(test["y"])
  report(json.dumps({"test_accuracy": 100 * accuracy}))
  if args.output:
    arrays = fsam_optax.host_metrics(
      {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
          state.replace(rng=jax.random.key_data(state.rng))
        )
      }
    )
    if jax.process_index() == 0:
      np.savez(args.output, **arrays)


def report(line: str) -> None:
  """Prints, in one process."""
  if jax.process_index() == 0:
    print(line, flush=True)


def main():
  """Launches, or joins the job and trains."""
  parser = flags()
  args = parser.parse_args()
  if args.launch is not None:
    if args.launch < 1:
      parser.error("--launch must be positive")
    argv = [x for x in sys.argv if x != f"--launch={args.launch}"]
    if "--launch" in argv:
      at = argv.index("--launch")
      del argv[at : at + 2]
    sys.exit(launch(args.launch, argv))
  if args.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", args.cpu_devices)
  jax.config.update("jax_enable_x64", args.double)
  job = (args.coordinator_address, args.num_processes, args.process_id)
  if args.distributed or any(x is not None for x in job):
    fsam_optax.initialize_processes(*job, timeout=args.timeout)
  if jax.process_count() == 1:
    train(args)
    return
  try:
    train(args)
  except BaseException:
    # Not by the normal exit, where JAX waits for the process that died.
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
  main()

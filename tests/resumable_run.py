"""A training run that saves as it goes, and goes on from where it was.

``python resumable_run.py DIRECTORY`` trains to the end from the last checkpoint
in the directory, or from the start. The tests import its parts.
"""

import sys

import jax
from jax import numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import fsam_optax
from fsam_optax import checkpoint

STEPS = 12
SAVE_EVERY = 2
WIDTH = 1024  # Writing four trees of WIDTH^2 takes long enough to interrupt.

# One of each, for a jitted step to be compiled once for all states.
ADAMW = optax.adamw(1e-2)
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.05)


def loss_fn(params, model_state, batch, rng):
  inputs, targets = batch
  hidden = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
  mean = hidden.mean(0)
  hidden = jnp.tanh(hidden - mean)
  if rng is not None:
    hidden = hidden * jax.random.bernoulli(rng, 0.8, hidden.shape)
  loss = jnp.mean((hidden @ params["output"] - targets) ** 2)
  old = model_state["batch_stats"]["mean"]
  return loss, ({"batch_stats": {"mean": 0.9 * old + 0.1 * mean}}, {})


def make_state(*, key=None, width=8, tx=ADAMW):
  """Adamw, statistics of BatchNorm's kind, a dropout key, F-SAM."""
  kernel = np.random.default_rng(1).normal(size=(width, width))
  return fsam_optax.TrainState.create(
    apply_fn=loss_fn,
    params={
      "hidden": {
        "kernel": jnp.array(kernel / width**0.5, jnp.float32),
        "bias": jnp.zeros(width),
      },
      "output": jnp.ones(width),
    },
    tx=tx,
    perturbation=PERTURBATION,
    model_state={"batch_stats": {"mean": jnp.zeros(width)}},
    rng=jax.random.key(2) if key is None else key,
  )


def batch_of(step, width=8):
  """The batch of a step: a resumed run must see the data it would have seen."""
  rng = np.random.default_rng((2, step))
  draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
  return draw(16, width), draw(16)


def make_manager(directory):
  return ocp.CheckpointManager(
    directory,
    options=ocp.CheckpointManagerOptions(max_to_keep=2),
    item_handlers=ocp.StandardCheckpointHandler(),
  )


def restore_latest(manager, state):
  checkpoint.check(manager.item_metadata(manager.latest_step()), state)
  return manager.restore(
    manager.latest_step(), args=ocp.args.StandardRestore(state)
  )


def main(directory):
  state = make_state(width=WIDTH)
  train_step = fsam_optax.make_train_step(loss_fn)
  with make_manager(directory) as manager:
    if manager.latest_step() is not None:
      state = restore_latest(manager, state)
    print(int(state.step), flush=True)
    for step in range(int(state.step), STEPS):
      # The save of the last step goes on while this one reuses its buffers.
      state, _ = train_step(state, batch_of(step, WIDTH))
      if (step + 1) % SAVE_EVERY == 0:
        manager.save(step + 1, args=ocp.args.StandardSave(state))


if __name__ == "__main__":
  main(sys.argv[1])

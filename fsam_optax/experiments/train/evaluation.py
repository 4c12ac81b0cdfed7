"""The evaluation of a state on images that it was not trained on."""

from typing import Any, Callable

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.train import batches as batches_lib
from fsam_optax.experiments.train.program import Program

Evaluate = Callable[
  [fsam_optax.TrainState, np.ndarray, np.ndarray], dict[str, float]
]


def evaluator(program: Program, rows: int) -> Evaluate:
  """Builds the evaluation, which takes so many rows at a time.

  Args:
    program: whose network and whose normalization of the images it takes.
    rows: of all devices together, a multiple of their number.

  Returns:
    A function of a state, all images and all labels, which each process has.
    It returns ``loss`` and ``accuracy``, the latter in percent.
  """

  count = _counter(program)
  feed = fsam_optax.sharding.BatchFeeder(program.mesh)
  mine = batches_lib.rows_of_process(rows)

  def evaluate(state, images, labels):
    total = {"loss": 0.0, "hits": 0}
    for start in range(0, len(labels), rows):
      x, y = images[start : start + rows], labels[start : start + rows]
      short = rows - len(y)
      # Filled up: another shape would be another program.
      batch = {
        "image": np.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))[mine],
        "label": np.pad(y, (0, short))[mine],
        "is_row": (np.arange(rows) < len(y))[mine],
      }
      found = count(state.params, state.model_state, feed(batch))
      # Waits: on the CPU, collectives of many steps in flight can deadlock.
      total = {k: v + np.asarray(found[k]).item() for k, v in total.items()}
    return {
      "loss": total["loss"] / len(labels),
      "accuracy": 100 * total["hits"] / len(labels),
    }

  return evaluate


def _counter(program: Program) -> Callable[..., dict[str, jax.Array]]:
  """The compiled sums over the rows of a batch that are rows of the data."""

  def count(params, model_state, batch):
    images = augmentation.normalize(
      batch["image"], program.mean, program.standard_deviation
    )
    logits: Any = program.network.apply(
      {"params": params, **model_state}, images, train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    is_row = batch["is_row"]
    return {
      "loss": jnp.sum(jnp.where(is_row, losses, 0)),
      "hits": jnp.sum((jnp.argmax(logits, -1) == batch["label"]) & is_row),
    }

  # On every device, or no process could read all of it.
  return jax.jit(
    count, out_shardings=NamedSharding(program.mesh, PartitionSpec())
  )

"""Real processes of ``train``: their end, and what they leave."""

import json
import time

from by_hand import is_key
import chex
import jax
import numpy as np
import orbax.checkpoint as ocp

SECONDS = 300
TIMES = ("seconds", "images_per_second", "waiting_fraction")


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


def metrics(output):
  """The metrics, a dict a line."""
  text = (output / "seed-1" / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def lines(output):
  """The metrics but for the clock's."""
  without = lambda line: {k: v for k, v in line.items() if k not in TIMES}
  return list(map(without, metrics(output)))


def arrays(output, batches):
  """The arrays of a checkpoint by name, whatever they were sharded over."""
  path = (checkpoint(output, batches) / "progress").absolute()
  with ocp.PyTreeCheckpointer() as checkpointer:
    metadata = checkpointer.metadata(path).item_metadata.tree
    as_numpy = lambda _: ocp.RestoreArgs(restore_type=np.ndarray)
    tree = checkpointer.restore(
      path, restore_args=jax.tree.map(as_numpy, metadata)
    )
  return {
    jax.tree_util.keystr(path): np.asarray(
      jax.random.key_data(x) if is_key(x) else x
    )
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def assert_same(output, unbroken, batches):
  """Asserts that two runs left the same lines and the same bits."""
  assert lines(output) == lines(unbroken)
  expected = arrays(unbroken, batches)
  assert len(expected) > 20
  chex.assert_trees_all_equal(arrays(output, batches), expected)

"""A TPU that is not there: what libtpu compiles for, with no chip at hand.

To be imported before JAX, which looks for a TPU as soon as it is. Needs the
package libtpu: ``pip install "jax[tpu]"``.
"""

import os

# The compiler alone, for a pod that is described.
os.environ.update(
  JAX_PLATFORMS="cpu",
  TPU_SKIP_MDS_QUERY="1",
  TPU_ACCELERATOR_TYPE="v5litepod-256",
  TPU_WORKER_HOSTNAMES="localhost",
  TPU_WORKER_ID="0",
  ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # No chip is held: several may compile.
)

from typing import Any

import jax
from jax.experimental import topologies
import numpy as np


def devices(topology: str) -> np.ndarray:
  """The chips of a topology such as ``v5e:2x2`` or ``v5p:4x4x4``."""
  described = topologies.get_topology_desc(topology, platform="tpu")
  return np.array(described.devices)


def place(tree: Any, shardings: Any) -> Any:
  """Shapes with shardings, as :func:`jax.jit` lowers for them.

  Args:
    tree: arrays or their shapes.
    shardings: a sharding for all of them, or a tree of shardings.

  Returns:
    The tree of :class:`jax.ShapeDtypeStruct`.
  """
  if isinstance(shardings, jax.sharding.Sharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )

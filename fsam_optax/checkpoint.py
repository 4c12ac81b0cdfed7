"""Checks whether a checkpoint fits a state.

Orbax saves and restores a :class:`fsam_optax.TrainState` as it is, with typed
keys and shardings. This module adds a clear error where the two differ.
"""

from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax._fsam import leaves_by_names
from fsam_optax._trees import PyTree

_MOST_NAMED = 10


def check(metadata: Any, state: PyTree) -> None:
  """Raises an error that names the differences of a checkpoint and a state.

  Orbax does not always raise: it drops arrays that the state does not have,
  casts to the dtypes of the state, and does not name an array of a wrong shape.
  This function reads the metadata alone, no array.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp, optax, tempfile
    >>> from fsam_optax import checkpoint
    >>> import orbax.checkpoint as ocp
    >>> state = fsam_optax.TrainState.create(
    ...   apply_fn=None,
    ...   params={"w": jnp.zeros(2)},
    ...   tx=optax.adamw(1e-3),
    ...   perturbation=fsam_optax.friendly_perturbation(rho=0.05),
    ...   rng=jax.random.key(0),
    ... )
    >>> directory = tempfile.mkdtemp()
    >>> with ocp.CheckpointManager(
    ...   directory, item_handlers=ocp.StandardCheckpointHandler()
    ... ) as manager:
    ...   _ = manager.save(1, args=ocp.args.StandardSave(state))
    ...   manager.wait_until_finished()
    ...   checkpoint.check(manager.item_metadata(1), state)
    ...   state = manager.restore(1, args=ocp.args.StandardRestore(state))

  Args:
    metadata: Orbax's metadata of the checkpoint:
      ``CheckpointManager(..., item_handlers=StandardCheckpointHandler())
      .item_metadata(step)``, or ``StandardCheckpointer().metadata(path)``.
    state: the state to restore into, of arrays or ``jax.ShapeDtypeStruct``.
      A Python scalar fits an array of shape ``[]`` of its kind, an integer of
      shape ``[]`` (a step) fits one of another width, and a typed or legacy key
      fits the data of a key.

  Raises:
    ValueError: if an array is missing in one of the two or has another shape
      or dtype, by path; or if the metadata are None, as a manager without
      ``item_handlers`` returns them.
  """
  # The metadata of a step hold those of the item, which hold the tree.
  tree = getattr(metadata, "item_metadata", metadata)
  tree = getattr(tree, "tree", tree)
  if tree is None:
    raise ValueError(
      "`metadata` must describe a checkpoint, got None. Create the manager "
      "with `item_handlers=orbax.checkpoint.StandardCheckpointHandler()`."
    )
  # By the names that Orbax gives them.
  saved, wanted = (
    {".".join(names): leaf for names, leaf in leaves_by_names(x).items()}
    for x in (tree, state)
  )
  paths = {
    "missing in the checkpoint": [x for x in wanted if x not in saved],
    "missing in the state": [x for x in saved if x not in wanted],
    "of another shape or dtype": [
      f"{path} (saved {_describe(saved[path])}, state {_describe(x)})"
      for path, x in wanted.items()
      if path in saved and not _fits(saved[path], x)
    ],
  }
  differences = [
    f"{what}: {', '.join(names[:_MOST_NAMED])}"
    + f" and {len(names) - _MOST_NAMED} more" * (len(names) > _MOST_NAMED)
    for what, names in paths.items()
    if names
  ]
  if not differences:
    return
  raise ValueError(
    f"The checkpoint must hold the arrays of `state`, got "
    f"{'; '.join(differences)}. Build the state with the model, optimizer, "
    "perturbation and kind of rng of the saved run; to move a run without "
    "F-SAM over, restore it into the state that it was saved from, Flax's or "
    "the optimizer's, and take what it holds over into the new one."
  )


def _shape_and_dtype(leaf):
  if not hasattr(leaf, "dtype"):  # A Python scalar.
    leaf = np.asarray(leaf)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    # Saved as its data, which a ShapeDtypeStruct does not have.
    leaf = jax.eval_shape(
      jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    )
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _fits(saved, wanted):
  shape, dtype = _shape_and_dtype(saved)
  wanted_shape, wanted_dtype = _shape_and_dtype(wanted)
  if shape != wanted_shape:
    return False
  # A step that began as a Python int was saved in 64 bits.
  is_count = not shape and dtype.kind == wanted_dtype.kind == "i"
  if is_count or isinstance(wanted, (bool, int, float, complex)):
    return dtype.kind == wanted_dtype.kind
  return dtype == wanted_dtype


def _describe(leaf):
  shape, dtype = _shape_and_dtype(leaf)
  return f"{dtype.name}{list(shape)}"

"""Checkpoints: does one fit a state, and how does an older one go on in F-SAM?

Orbax saves and restores a :class:`fsam_optax.TrainState` as it is, typed keys
and shardings included. This file adds only what it does not say.

A checkpoint of a plain optimizer, say ``optax.adamw(1e-3)``, goes on under
``tx = optax.chain(fsam_optax.fsam(), optax.adamw(1e-3))`` in two lines: it is
restored into the state that it was saved from, and that goes into the chain::

  opt_state = restore_checkpoint(path, optax.adamw(1e-3).init(params))
  opt_state = checkpoint.into_chain(opt_state, tx, params)

Restored into ``tx.init(params)`` instead, by position or by name, the moments
may be those of another link, or zero, without an error.
"""

from typing import Any

from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import optax

from fsam_optax._ascent import is_of_optimizer
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._trees import joined_path
from fsam_optax._versions import as_pure


def check(metadata: Any, state: Any) -> None:
  """Raises an error that names what differs between a checkpoint and a state.

  Orbax needs no help to save and restore a :class:`fsam_optax.TrainState`. On a
  state of another structure it is not always loud, though: it drops what the
  state has no place for, casts to the state's dtypes, and does not say which
  array has the wrong shape. This function reads the metadata alone, no array.

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

    To restore onto other devices, restore into
    ``jax.ShapeDtypeStruct(shape, dtype, sharding=...)`` leaves.

  Args:
    metadata: what Orbax knows about the checkpoint:
      ``CheckpointManager(..., item_handlers=StandardCheckpointHandler())
      .item_metadata(step)``, or ``StandardCheckpointer().metadata(path)``.
    state: the state to restore into, of arrays or ``jax.ShapeDtypeStruct``.
      A Python scalar fits an array of shape ``[]`` and of its kind, and an
      integer of shape ``[]``, such as a step, one of another width. A key fits
      key data of its shape, of which alone the metadata tell: the restored key
      is of the kind that was saved, typed or legacy.

  Raises:
    ValueError: if an array is missing in one of the two or has another shape
      or dtype, by path; or if the metadata are None, as a manager without
      ``item_handlers`` returns them.

  .. note::
    Only arrays are in a checkpoint. The static fields ``tx`` and
    ``perturbation``, with constants such as rho, come from the code that
    builds the state, which therefore can change them on the way.
  """
  # A step's metadata hold the item's, and these the tree.
  tree = getattr(metadata, "item_metadata", metadata)
  tree = getattr(tree, "tree", tree)
  if tree is None:
    raise ValueError(
      "`metadata` must describe a checkpoint, got None. Create the manager "
      "with `item_handlers=orbax.checkpoint.StandardCheckpointHandler()`."
    )
  saved, wanted = _leaves_by_dotted_path(tree), _leaves_by_dotted_path(state)
  for path in _averages_of_optimizer(state):
    # Another run's own average, which Orbax drops and this one does not need.
    saved = {
      name: leaf
      for name, leaf in saved.items()
      if name != path and not name.startswith(f"{path}.")
    }
  differences = _differences(
    saved, wanted, ("the checkpoint", "saved"), ("the state", "state")
  )
  if not differences:
    return
  missing = wanted.keys() - saved.keys()
  if _is_of_flax(saved, missing):
    remedy = (
      "If it was saved from flax's own TrainState, restore it into that and "
      "convert with `TrainState.from_flax`"
    )
  else:
    remedy = (
      "Build the state with the model, optimizer, perturbation and kind of rng "
      "of the saved run"
    )
  raise ValueError(
    f"The checkpoint must hold the arrays of `state`, got "
    f"{'; '.join(differences)}. {remedy}."
  )


def into_chain(
  opt_state: Any, tx: optax.GradientTransformation, params: Any
) -> Any:
  """Puts the state of an optimizer behind a fresh first link of a chain.

  For a run that goes on with :func:`fsam_optax.fsam` in front of the optimizer
  that it had: moments, counts and schedules go on, and only the first link
  begins anew.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp, optax
    >>> from fsam_optax import checkpoint
    >>> params = {"w": jnp.zeros(2)}
    >>> adam = optax.adam(1e-3)
    >>> _, opt_state = adam.update({"w": jnp.ones(2)}, adam.init(params))
    >>> tx = optax.chain(fsam_optax.fsam(rho=0.05), adam)
    >>> opt_state = checkpoint.into_chain(opt_state, tx, params)
    >>> print(opt_state[0][0].count, opt_state[1][0].count)
    0 1

    An optimizer of Flax NNX holds the same state in Variables, and takes it
    back:

    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> old = nnx.Optimizer(model, adam, wrt=nnx.Param)
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> optimizer.step = old.step
    >>> optimizer.opt_state = checkpoint.into_chain(
    ...   old.opt_state, tx, nnx.state(model, nnx.Param)
    ... )

  Args:
    opt_state: the state of what stands behind the first link of ``tx``. Its
      arrays become the new state's.
    tx: an :func:`optax.chain`, either of the first link and the optimizer of
      ``opt_state``, or of the first link and the links that this optimizer is
      itself a chain of; which of the two, the structures tell.
    params: the parameters, in the tree that ``opt_state`` was made for; for an
      ``opt_state`` of Variables the ``nnx.State`` of the Variables.

  Returns:
    A state of ``tx``. ``tx.init`` runs once, and what it makes for the other
    links is dropped.

  Raises:
    ValueError: if ``tx`` is no chain of two links or more, or ``opt_state``
      fits neither way; the error names what differs, by path.
  """
  template: Any = jax.eval_shape(tx.init, _arrays(params))
  if type(template) is not tuple or len(template) < 2:
    raise ValueError(
      "`tx` must be an `optax.chain` of two links or more, got one whose state "
      f"is {type(template).__name__}. Build it as "
      "`optax.chain(fsam_optax.fsam(...), optimizer)`."
    )
  is_nested = _pick_fitting(
    {
      is_nested: (_arrays(opt_state), rest)
      for is_nested, rest in _behind_the_first(template).items()
    },
    "be that of `tx` without its first link",
    fits_as_it_is=(_arrays(opt_state), template),
  )
  if _has_variables(opt_state):
    fresh: Any = nnx.optimizer.to_opt_state(tx.init(params))
  else:
    fresh = tx.init(_arrays(params))
  first = fresh[0]
  return (first, opt_state) if is_nested else (first, *opt_state)


def out_of_chain(
  opt_state: Any, tx: optax.GradientTransformation, params: Any
) -> Any:
  """Takes the state of an optimizer out from behind the first link of a chain.

  The inverse of :func:`into_chain`, for a run that goes on without F-SAM.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp, optax
    >>> from fsam_optax import checkpoint
    >>> params, adam = {"w": jnp.zeros(2)}, optax.adam(1e-3)
    >>> chain = optax.chain(fsam_optax.fsam(rho=0.05), adam)
    >>> opt_state = checkpoint.out_of_chain(chain.init(params), adam, params)
    >>> updates, _ = adam.update({"w": jnp.ones(2)}, opt_state)

  Args:
    opt_state: the state of the chain.
    tx: the optimizer to go on with, of whose state the structure tells what to
      take: all links but the first as a chain of their own, or the second.
    params: the parameters, as for :func:`into_chain`.

  Returns:
    A state of ``tx``, of arrays of ``opt_state``.

  Raises:
    ValueError: if ``opt_state`` is no state of a chain of two links or more, or
      fits neither way; the error names what differs, by path.
  """
  if type(opt_state) is not tuple or len(opt_state) < 2:
    raise ValueError(
      "`opt_state` must be that of an `optax.chain` of two links or more, got "
      f"{type(opt_state).__name__}."
    )
  template = jax.eval_shape(tx.init, _arrays(params))
  is_nested = _pick_fitting(
    {
      is_nested: (rest, template)
      for is_nested, rest in _behind_the_first(_arrays(opt_state)).items()
    },
    "hold that of `tx` behind its first link",
    fits_as_it_is=(_arrays(opt_state), template),
  )
  return opt_state[1] if is_nested else opt_state[1:]


def _behind_the_first(state):
  """What is meant, by whether it is one link or a chain of all the others."""
  return ({True: state[1]} if len(state) == 2 else {}) | {False: state[1:]}


def _pick_fitting(pairs, what, fits_as_it_is):
  """The key of the pair of a state and its template that fit each other."""
  found = {key: _state_differences(*pair) for key, pair in pairs.items()}
  for key, differences in found.items():
    if not differences:
      return key
  if not _state_differences(*fits_as_it_is):
    remedy = "It is a state of `tx` as it is"
  else:
    remedy = (
      "Restore a checkpoint into the state that it was saved from, the "
      "`init(params)` of that optimizer, and hand over that"
    )
  # Of the two the one that differs in fewer ways is the one that was meant.
  closest = min(found.values(), key=len)
  raise ValueError(
    f"`opt_state` must {what}, got {'; '.join(closest)}. {remedy}."
  )


def _state_differences(state, template):
  """What differs between a state and what a transformation would make."""
  found, wanted = map(_leaves_by_dotted_path, (state, template))
  differences = _differences(
    found, wanted, ("`opt_state`", "got"), ("that of `tx`", "`tx`")
  )
  if not differences and (
    jax.tree.structure(state) != jax.tree.structure(template)
  ):
    differences = [
      "its arrays in other containers, "
      f"{jax.tree.structure(state)} for {jax.tree.structure(template)}"
    ]
  return differences


def _has_variables(tree):
  is_variable = lambda x: isinstance(x, nnx.Variable)
  return any(map(is_variable, jax.tree.leaves(tree, is_leaf=is_variable)))


def _arrays(tree):
  """The tree with arrays for the Variables of NNX, if it has any."""
  return as_pure(tree) if _has_variables(tree) else tree


def _differences(found, wanted, source, target):
  """Phrases on what differs between two dicts of leaves by path."""
  (here, got), (there, want) = source, target
  paths = {
    f"missing in {here}": [path for path in wanted if path not in found],
    f"missing in {there}": [path for path in found if path not in wanted],
    "of another shape or dtype": [
      f"{path} ({got} {_describe(found[path])}, {want} {_describe(x)})"
      for path, x in wanted.items()
      if path in found and not _fits(found[path], x)
    ],
  }
  return [
    f"{what}: {_enumerate(names)}" for what, names in paths.items() if names
  ]


_MOST_NAMED = 10


def _enumerate(paths):
  named = ", ".join(paths[:_MOST_NAMED])
  rest = len(paths) - _MOST_NAMED
  return f"{named} and {rest} more" if rest > 0 else named


def _leaves_by_dotted_path(tree):
  """The leaves by path: the names that Orbax, too, gives them."""
  return {
    joined_path(path, "."): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _averages_of_optimizer(state):
  """The paths of averages that are kept as the optimizer's momentum."""
  is_found = lambda x: isinstance(x, SubtractGradientEmaState)
  return [
    joined_path((*path, jax.tree_util.GetAttrKey("ema")), ".")
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=is_found)
    if is_of_optimizer(x)
  ]


def _shape_and_dtype(leaf):
  if not hasattr(leaf, "dtype"):  # A Python scalar.
    leaf = np.asarray(leaf)
  if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    # Saved as its data. A ShapeDtypeStruct has none, hence no evaluation.
    leaf = jax.eval_shape(
      jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    )
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _fits(saved, wanted):
  shape, dtype = _shape_and_dtype(saved)
  wanted_shape, wanted_dtype = _shape_and_dtype(wanted)
  if shape != wanted_shape:
    return False
  # A step that began as a Python int was saved in 64 bits; no count overflows.
  is_count = not shape and dtype.kind == wanted_dtype.kind == "i"
  if is_count or isinstance(wanted, (bool, int, float, complex)):
    return dtype.kind == wanted_dtype.kind
  return dtype == wanted_dtype


def _describe(leaf):
  shape, dtype = _shape_and_dtype(leaf)
  return f"{dtype.name}{list(shape)}"


def _is_of_flax(saved, missing):
  """Whether only what flax's own train state lacks is missing."""
  roots = {path.split(".")[0] for path in missing}
  return "perturbation_state" in roots and not any(
    path.split(".")[0] == "perturbation_state" for path in saved
  )

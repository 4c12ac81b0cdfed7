"""What the two passes know of a perturbation's state.

A perturbation may be any chain of optax. Found inside its state are the average
of :func:`subtract_gradient_ema` and the norms of :func:`scale_to_radius`, which
are reported without another pass over a tree.
"""

from typing import Any, Optional

import jax
from jax import numpy as jnp
import optax

from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._tree_paths import leaves_by_path


def find_state(state_type: type, state: optax.OptState) -> Optional[Any]:
  """The first state of this type inside a nested optimizer state."""
  is_found = lambda x: isinstance(x, state_type)
  leaves = jax.tree.leaves(state, is_leaf=is_found)
  return next(filter(is_found, leaves), None)


def is_memoryless(state: optax.OptState) -> bool:
  """Whether the state is the same whatever gradients it was updated with."""
  leaves = jax.tree.leaves(state, is_leaf=_is_memoryless)
  return all(map(_is_memoryless, leaves))


def radius_norms(state: optax.OptState) -> list[tuple[jax.Array, jax.Array]]:
  """Direction and perturbation norms of every :func:`scale_to_radius` inside.

  Args:
    state: of a perturbation.

  Returns:
    A pair of scalars for each, in the order of the chain.
  """
  leaves = jax.tree.leaves(state, is_leaf=_is_radius_state)
  return [
    (x.direction_norm, x.perturbation_norm)
    for x in filter(_is_radius_state, leaves)
  ]


def with_radius_norms(
  state: optax.OptState, norms: list[tuple[jax.Array, jax.Array]]
) -> optax.OptState:
  """The state with these norms: of the ascent, not of the average's update.

  Args:
    state: of a perturbation.
    norms: as :func:`radius_norms` returns them.

  Returns:
    The state, with nothing else changed.
  """
  left = iter(norms)

  def replace(x):
    if not _is_radius_state(x):
      return x
    direction_norm, perturbation_norm = next(left)
    return x._replace(
      direction_norm=direction_norm, perturbation_norm=perturbation_norm
    )

  return jax.tree.map(replace, state, is_leaf=_is_radius_state)


def with_radius_states(is_new: Any, new: Any, old: Any) -> optax.OptState:
  """The new state, with the old counts and norms unless `is_new`.

  Args:
    is_new: a bool of shape ``[]``, traced or not.
    new: the state after an update.
    old: the state before it.

  Returns:
    The state; an average, with its count, is that of ``new``.
  """
  return jax.tree.map(
    lambda x, y: (
      jax.tree.map(lambda a, b: jnp.where(is_new, a, b), x, y)
      if _is_memoryless(x)
      else x
    ),
    new,
    old,
    is_leaf=_is_memoryless,
  )


def state_difference(
  perturbation: optax.GradientTransformation,
  state: optax.OptState,
  params: optax.Params,
) -> Optional[str]:
  """Where a state is not one that a perturbation makes for the parameters.

  Args:
    perturbation: from gradients to perturbations.
    state: what is taken for its state.
    params: the parameters, of which only shapes and dtypes count.

  Returns:
    None where it is one. Else the first difference, such as ``"shape [3] at
    .ema['w'], got [2]"``.
  """
  expected = jax.eval_shape(perturbation.init, params)
  shapes = lambda tree: {
    path: list(jnp.shape(x)) for path, x in leaves_by_path(tree)
  }
  wanted, found = shapes(expected), shapes(state)
  for path in [*wanted, *found]:
    if wanted.get(path) != found.get(path):
      return (
        f"{_describe(wanted.get(path))} at {path}, got "
        f"{_describe(found.get(path))}"
      )
  structures = jax.tree.structure(expected), jax.tree.structure(state)
  if structures[0] != structures[1]:
    return f"the structure {structures[0]}, got {structures[1]}"
  return None


def _describe(shape: Optional[list[int]]) -> str:
  return "no array" if shape is None else f"shape {shape}"


def _is_radius_state(x: Any) -> bool:
  return isinstance(x, ScaleToRadiusState)


def _is_memoryless(x: Any) -> bool:
  """Whether it is a state of scalars, and not one with an average."""
  return _is_radius_state(x) or is_of_optimizer(x)


def is_of_optimizer(x: Any) -> bool:
  """Whether it is the state of an average that the optimizer's momentum is."""
  return isinstance(x, SubtractGradientEmaState) and x.ema is None

"""The ascent of one step: how far it goes, and what the second pass sees.

A perturbation may be any chain of optax. Inside its state are found the average
of :func:`subtract_gradient_ema` and the norms of :func:`scale_to_radius`, which
are reported without another pass over a tree.
"""

import dataclasses
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
import optax
import optax.tree

from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen
from fsam_optax._trees import PyTree
from fsam_optax._trees import cosine
from fsam_optax._trees import difference


class Norms(NamedTuple):
  """How long the direction and the perturbation were.

  Attributes:
    of_radii: a pair for each radius in the perturbation's state, as that has
      them.
    direction: of all parameters.
    perturbation: of all parameters.
  """

  of_radii: list[tuple[jax.Array, jax.Array]]
  direction: jax.Array
  perturbation: jax.Array


@dataclasses.dataclass(frozen=True)
class Ascent:
  """The perturbation of one step, and whether the step takes it."""

  perturbation: optax.GradientTransformation
  state: optax.OptState
  params: optax.Params
  gate: ArrayLike  # True, False or a traced bool.
  # For a perturbation whose average is the optimizer's momentum.
  optimizer_state: Optional[optax.OptState] = None
  optimizer_steps: Optional[ArrayLike] = None

  def perturb(self, gradient: PyTree, **extra) -> tuple[PyTree, PyTree, Norms]:
    """The perturbation, the next state, and the norms of both steps to it."""
    gradient = ascent_gradient(gradient)
    epsilon, state = optax.with_extra_args_support(self.perturbation).update(
      gradient,
      self.state,
      self.params,
      optimizer_state=self.optimizer_state,
      optimizer_steps=self.optimizer_steps,
      **extra,
    )
    norms = _norms(state)
    if not norms:  # Not one of ours.
      direction = global_norm(gradient)
    else:
      squares = [jnp.square(direction) for direction, _ in norms]
      direction = jnp.sqrt(sum(squares)) if norms[1:] else norms[0][0]
    is_narrow = any(_is_narrow(x) for x in jax.tree.leaves(self.params))
    if len(norms) == 1 and not is_narrow:
      perturbation = norms[0][1]
    else:
      perturbation = global_norm(jax.tree.map(_move, self.params, epsilon))
    return epsilon, state, Norms(norms, direction, perturbation)

  def advance(
    self, gradient: PyTree, norms: Norms, is_finite: Optional[ArrayLike]
  ) -> optax.OptState:
    """The next state where another gradient feeds the average than ascends.

    The state is updated twice, and of either update only one half is read: the
    perturbation of the first, the average of the second. XLA drops the others.
    """
    _, state, _ = self.perturb(gradient, is_finite=is_finite)
    return _with_norms(state, norms.of_radii)

  def measure(self, gradient: PyTree) -> tuple[jax.Array, jax.Array]:
    """The gradient's norm, and its cosine with the average before the step."""
    norm = global_norm(ascent_gradient(gradient))
    average_state = find_state(SubtractGradientEmaState, self.state)
    if average_state is None:
      return norm, jnp.zeros_like(norm)
    average = average_state.ema
    if average is None:
      averages = []
      self.perturb(gradient, averages=averages)
      average = averages[0]  # Of the first group, where there are several.
    return norm, cosine(average, ascent_gradient(gradient))

  def descend(
    self,
    epsilon: PyTree,
    descend: Callable[[PyTree], PyTree],
    stay: Callable[[Optional[PyTree]], PyTree],
    gradient: Optional[PyTree],
  ) -> PyTree:
    """What the second pass returns, or the first where the gate is shut.

    On a GPU a conditional holds what goes into either branch beside what comes
    out. So there one tree goes in, which is the perturbed weights or the
    gradient. On a CPU and a TPU that would cost a word a parameter.

    Args:
      epsilon: the perturbation.
      descend: ``descend(perturbed)``, the second pass.
      stay: ``stay(gradient)`` returns the like, made of the first.
      gradient: for `stay`, of the parameters' shapes; None if it has its own.

    Returns:
      What either returns.
    """
    if self.gate is False:
      return stay(gradient)
    # Outside the branch, or it would hold the perturbation besides.
    perturbed = optax.apply_updates(self.params, epsilon)
    if self.gate is True:
      return descend(perturbed)

    def either(perturbed, gradient):
      return jax.lax.cond(
        self.gate, lambda: descend(perturbed), lambda: stay(gradient)
      )

    if gradient is None:
      return either(perturbed, None)

    def in_one(perturbed, gradient):
      # A scaled loss's gradient may be wider than the weights.
      one = jax.tree.map(
        lambda w, g: jnp.where(self.gate, w, g), perturbed, gradient
      )
      return either(optax.tree.cast_like(one, perturbed), one)

    return jax.lax.platform_dependent(
      perturbed, gradient, cpu=either, tpu=either, default=in_one
    )


def find_state(state_type: type, state: optax.OptState) -> Optional[Any]:
  """The first state of this type inside a nested optimizer state."""
  is_found = lambda x: isinstance(x, state_type)
  leaves = jax.tree.leaves(state, is_leaf=is_found)
  return next(filter(is_found, leaves), None)


def is_memoryless(state: optax.OptState) -> bool:
  """Whether the state is the same whatever gradients it was updated with."""
  leaves = jax.tree.leaves(state, is_leaf=_is_scalars)
  return all(map(_is_scalars, leaves))


def is_of_optimizer(state: PyTree) -> bool:
  """Whether it is the state of an average that is the optimizer's momentum."""
  return isinstance(state, SubtractGradientEmaState) and state.ema is None


def with_scalars(is_new: ArrayLike, new: PyTree, old: PyTree) -> optax.OptState:
  """The new state of a perturbation, with the old scalars unless `is_new`.

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
      if _is_scalars(x)
      else x
    ),
    new,
    old,
    is_leaf=_is_scalars,
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
    0/ema/w, got shape [2]"``.
  """
  expected = jax.eval_shape(perturbation.init, params)
  # An average may be in another dtype than that of the parameters today.
  shape = lambda x: "no array" if x is None else f"shape {list(jnp.shape(x))}"
  structures = jax.tree.structure(expected), jax.tree.structure(state)
  if differing := difference(expected, state, shape):
    return differing
  if structures[0] != structures[1]:
    return f"the structure {structures[0]}, got {structures[1]}"
  return None


def _with_norms(state, norms):
  """The state with the norms of the ascent, not of the average's update."""
  left = iter(norms)

  def replace(x):
    if not isinstance(x, ScaleToRadiusState):
      return x
    direction_norm, perturbation_norm = next(left)
    return x._replace(
      direction_norm=direction_norm, perturbation_norm=perturbation_norm
    )

  is_radius = lambda x: isinstance(x, ScaleToRadiusState)
  return jax.tree.map(replace, state, is_leaf=is_radius)


def _norms(state):
  """Direction and perturbation norm of every radius, in the chain's order."""
  is_radius = lambda x: isinstance(x, ScaleToRadiusState)
  leaves = jax.tree.leaves(state, is_leaf=is_radius)
  return [
    (x.direction_norm, x.perturbation_norm) for x in filter(is_radius, leaves)
  ]


def _is_scalars(x):
  """Whether it is a state of scalars, and not one with an average."""
  return isinstance(x, ScaleToRadiusState) or is_of_optimizer(x)


def _is_narrow(x: ArrayLike) -> bool:
  return jnp.finfo(jnp.result_type(x)).bits < 32


def _move(weight: jax.Array, step: jax.Array) -> jax.Array:
  """What a step moves a weight by, when the sum is rounded to its dtype."""
  if not _is_narrow(weight):
    return step
  dtype = jnp.finfo(weight.dtype)
  # A compiler may leave out a cast there and back, this never.
  moved = jax.lax.reduce_precision(
    widen(weight) + widen(step), dtype.nexp, dtype.nmant
  )
  return moved - widen(weight)

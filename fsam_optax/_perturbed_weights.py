"""The weights that one step perturbs, the norms, and the next state.

A perturbation may be any chain of optax. The average of
:func:`subtract_gradient_ema` and the norms of :func:`scale_to_radius` are read
from its state, which saves another pass over a tree.
"""

import dataclasses
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
import optax
import optax.tree

from fsam_optax._perturbation import OfOneRadius
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen
from fsam_optax._trees import PyTree
from fsam_optax._trees import cosine


class Norms(NamedTuple):
  """The norms of the direction and the perturbation, over all parameters."""

  # Those of each `scale_to_radius` in the perturbation.
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
  # For a perturbation with average="optimizer".
  optimizer_state: Optional[optax.OptState] = None
  optimizer_steps: Optional[ArrayLike] = None

  def perturb(self, gradient: PyTree, **extra) -> tuple[PyTree, PyTree, Norms]:
    """The perturbation, its next state, and the norms."""
    gradient = ascent_gradient(gradient)
    epsilon, state = optax.with_extra_args_support(self.perturbation).update(
      gradient,
      self.state,
      self.params,
      optimizer_state=self.optimizer_state,
      optimizer_steps=self.optimizer_steps,
      **extra,
    )
    norms = [
      (x.direction_norm, x.perturbation_norm)
      for x in find_states(ScaleToRadiusState, state)
    ]
    if not norms:  # A perturbation without `scale_to_radius`.
      direction = global_norm(gradient)
    else:
      squares = [jnp.square(direction) for direction, _ in norms]
      direction = jnp.sqrt(sum(squares)) if norms[1:] else norms[0][0]
    is_narrow = any(_is_narrow(x) for x in jax.tree.leaves(self.params))
    if isinstance(self.perturbation, OfOneRadius) and not is_narrow:
      perturbation = norms[0][1]
    else:
      perturbation = global_norm(jax.tree.map(_move, self.params, epsilon))
    return epsilon, state, Norms(norms, direction, perturbation)

  def advance(
    self, gradient: PyTree, norms: Norms, is_finite: Optional[ArrayLike]
  ) -> optax.OptState:
    """The next state if another gradient than the ascent's enters the average.

    The state is updated twice. The perturbation is read from the first update,
    and the average from the second; XLA drops the rest of both.
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
      average = averages[0]  # Of the first group of parameters.
    gradient = ascent_gradient(gradient)
    if isinstance(average, jax.Array) and average.ndim == 1:
      gradient = ravel_pytree(gradient)[0]  # As `optax.flatten` does.
    return norm, cosine(average, gradient)

  def descend(
    self,
    epsilon: PyTree,
    descend: Callable[[PyTree], PyTree],
    stay: Callable[[Optional[PyTree]], PyTree],
    gradient: Optional[PyTree],
  ) -> PyTree:
    """``descend(perturbed)`` if the gate is open, ``stay(gradient)`` if not.

    The gradient is None where `stay` has its own. On a GPU a conditional keeps
    the inputs of both branches beside the outputs. So one tree goes in there,
    the perturbed weights or the gradient. On a CPU and a TPU that would cost a
    word a parameter.
    """
    if self.gate is False:
      return stay(gradient)
    # Outside the branch, which would keep the perturbation, too.
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
        lambda w, g: jnp.where(self.gate, w.astype(g.dtype), g),
        perturbed,
        gradient,
      )
      return either(optax.tree.cast_like(one, perturbed), one)

    return jax.lax.platform_dependent(
      perturbed, gradient, cpu=either, tpu=either, default=in_one
    )


def find_states(state_type: type, state: optax.OptState) -> list[Any]:
  """The states of a type inside a nested optimizer state, in order."""
  is_one = lambda x: isinstance(x, state_type)
  return [x for x in jax.tree.leaves(state, is_leaf=is_one) if is_one(x)]


def find_state(state_type: type, state: optax.OptState) -> Optional[Any]:
  """The first of these states, or None."""
  return next(iter(find_states(state_type, state)), None)


def is_memoryless(state: optax.OptState) -> bool:
  """Whether the state holds no average of gradients."""
  is_scalars = lambda x: isinstance(x, ScaleToRadiusState) or is_of_optimizer(x)
  return all(map(is_scalars, jax.tree.leaves(state, is_leaf=is_scalars)))


def is_of_optimizer(state: PyTree) -> bool:
  """Whether it is the state of an average in the optimizer's momentum."""
  return isinstance(state, SubtractGradientEmaState) and state.ema is None


def with_averages(
  is_new: ArrayLike, new: PyTree, old: PyTree
) -> optax.OptState:
  """The new averages with their counts; all else new if `is_new`."""
  is_average = lambda x: (
    isinstance(x, SubtractGradientEmaState) and not is_of_optimizer(x)
  )
  return jax.tree.map(
    lambda x, y: x if is_average(x) else jnp.where(is_new, x, y),
    new,
    old,
    is_leaf=is_average,
  )


def _with_norms(state, norms):
  """The state with the norms of the ascent, not of a second update."""
  left = iter(norms)
  is_radius = lambda x: isinstance(x, ScaleToRadiusState)
  return jax.tree.map(
    lambda x: ScaleToRadiusState(x.count, *next(left)) if is_radius(x) else x,
    state,
    is_leaf=is_radius,
  )


def _is_narrow(x: ArrayLike) -> bool:
  return jnp.finfo(jnp.result_type(x)).bits < 32


def _move(weight: jax.Array, step: jax.Array) -> jax.Array:
  """The change of a weight by a step, after rounding to its dtype."""
  if not _is_narrow(weight):
    return step
  dtype = jnp.finfo(weight.dtype)
  # A compiler may remove a cast and its inverse, but not this.
  moved = jax.lax.reduce_precision(
    widen(weight) + widen(step), dtype.nexp, dtype.nmant
  )
  return moved - widen(weight)

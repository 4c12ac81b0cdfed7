"""The ascent of one step: how far it goes, and what the second pass sees."""

import dataclasses
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
from jax.typing import ArrayLike
import optax

from fsam_optax._cosine import cosine
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen
from fsam_optax._perturbation_state import find_state
from fsam_optax._perturbation_state import radius_norms
from fsam_optax._perturbation_state import with_radius_norms


class Norms(NamedTuple):
  """How long the direction and the perturbation were.

  Attributes:
    of_radii: a pair for each radius in the perturbation's state, as that has
      them.
    direction: of all parameters.
    perturbation: of all parameters.
  """

  of_radii: Any
  direction: jax.Array
  perturbation: jax.Array


@dataclasses.dataclass(frozen=True)
class Ascent:
  """The perturbation of one step, and whether the step takes it."""

  perturbation: optax.GradientTransformation
  state: optax.OptState
  params: optax.Params
  gate: Any  # True, False or a traced bool.
  # For a perturbation whose average is the optimizer's momentum.
  optimizer_state: Optional[optax.OptState] = None
  optimizer_steps: Optional[ArrayLike] = None

  def perturb(self, gradient: Any, **extra) -> tuple[Any, Any, Norms]:
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
    found = radius_norms(state)
    if not found:  # Not one of ours.
      direction = global_norm(gradient)
    else:
      squares = [jnp.square(direction) for direction, _ in found]
      direction = jnp.sqrt(sum(squares)) if found[1:] else found[0][0]
    is_narrow = any(_is_narrow(x) for x in jax.tree.leaves(self.params))
    if len(found) == 1 and not is_narrow:
      perturbation = found[0][1]
    else:
      perturbation = global_norm(jax.tree.map(_move, self.params, epsilon))
    return epsilon, state, Norms(found, direction, perturbation)

  def advance(
    self, gradient: Any, norms: Norms, is_finite: Optional[ArrayLike]
  ) -> optax.OptState:
    """The next state where another gradient feeds the average than ascends.

    The state is updated twice, and of either update only one half is read: the
    perturbation of the first, the average of the second. XLA drops the others.
    """
    _, state, _ = self.perturb(gradient, is_finite=is_finite)
    return with_radius_norms(state, norms.of_radii)

  def measure(self, gradient: Any) -> tuple[jax.Array, jax.Array]:
    """The gradient's norm, and its cosine with the average before the step."""
    norm = global_norm(ascent_gradient(gradient))
    found = find_state(SubtractGradientEmaState, self.state)
    if found is None:
      return norm, jnp.zeros_like(norm)
    average = found.ema
    if average is None:
      averages = []
      self.perturb(gradient, averages=averages)
      [average] = averages
    return norm, cosine(average, ascent_gradient(gradient))

  def descend(
    self,
    epsilon: Any,
    descend: Callable[[Any], Any],
    stay: Callable[[], Any],
    mark: Callable[[Any], Any],
  ) -> Any:
    """What `descend(perturbed)` returns, or `stay()` where the gate is shut."""
    if self.gate is False:
      return stay()
    # Outside the branch, or it would hold the perturbation besides.
    perturbed = mark(optax.apply_updates(self.params, epsilon))
    if self.gate is True:
      return descend(perturbed)
    return jax.lax.cond(self.gate, lambda: descend(perturbed), stay)


def _is_narrow(x: Any) -> bool:
  return jnp.finfo(jnp.result_type(x)).bits < 32


def _move(weight: Any, step: Any) -> Any:
  """What a step moves a weight by, when the sum is rounded to its dtype."""
  if not _is_narrow(weight):
    return step
  dtype = jnp.finfo(weight.dtype)
  # A compiler may leave out a cast there and back, this never.
  moved = jax.lax.reduce_precision(
    widen(weight) + widen(step), dtype.nexp, dtype.nmant
  )
  return moved - widen(weight)

"""Ascents and train steps of cheap forms that the library does not have.

Each step takes the arguments of :func:`fsam_optax.make_train_step`, of which it
ignores the options, and is for the ascent of the same name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax


class HoldState(NamedTuple):
  """State of :func:`hold`: its count, what it holds and the inner state."""

  count: jax.typing.ArrayLike
  held: Any
  inner: Any


def hold(
  inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
  """The inner perturbation at every k-th step, and again until the next."""

  def init_fn(params):
    zeros = optax.tree.zeros_like(params)
    return HoldState(jnp.zeros([], jnp.int32), zeros, inner.init(params))

  def update_fn(updates, state, params=None):
    fresh, fresh_state = inner.update(updates, state.inner, params)
    is_fresh = state.count % every == 0
    choose = lambda a, b: jax.tree.map(
      lambda x, y: jnp.where(is_fresh, x, y), a, b
    )
    held = choose(fresh, state.held)
    count = optax.safe_increment(state.count)
    return held, HoldState(count, held, choose(fresh_state, state.inner))

  return optax.GradientTransformation(init_fn, update_fn)


class ParallelState(NamedTuple):
  """State of :func:`parallel`: the ascent's, and the auxiliary gradient."""

  inner: Any
  gradient: Any


def parallel(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent whose state also holds a gradient, for :func:`parallel_step`."""
  return optax.GradientTransformation(
    lambda params: ParallelState(
      inner.init(params), optax.tree.zeros_like(params)
    ),
    inner.update,
  )


def parallel_step(
  loss_fn: Callable[..., Any], *, fraction: float = 0.2, **options: Any
) -> Callable[[Any, Any], Any]:
  """SAMPa's step: two gradients that do not wait for each other.

  From the last gradient at the auxiliary weights follow both points, at once:
  the perturbed weights, and the next auxiliary weights, which are a step of
  gradient descent away, by the ``"rate"`` of the batch. The optimizer gets the
  mean of the two gradients, with ``fraction`` of the auxiliary one (Xie et al.,
  `SAMPa <https://arxiv.org/abs/2410.10683>`_, 2024). With the ascent of F-SAM
  it is the friendly form.
  """
  del options

  def step(state, batch):
    pass_at = jax.value_and_grad(
      lambda params: loss_fn(params, state.model_state, batch, None)[0]
    )
    inner, gradient = state.perturbation_state
    epsilon, inner = state.perturbation.update(gradient, inner, state.params)
    auxiliary = optax.tree.add_scale(state.params, -batch["rate"], gradient)
    loss, auxiliary_gradient = pass_at(auxiliary)
    _, perturbed_gradient = pass_at(optax.tree.add(state.params, epsilon))
    gradient = jax.tree.map(
      lambda a, b: fraction * a + (1 - fraction) * b,
      auxiliary_gradient,
      perturbed_gradient,
    )
    state = state.apply_gradients(
      grads=gradient,
      perturbation_state=ParallelState(inner, auxiliary_gradient),
    )
    return state, {"loss": loss}

  return step


class GateState(NamedTuple):
  """State of :func:`gated`.

  Attributes:
    inner: state of the ascent.
    mean: of the squared norms of the gradients, shape ``[]``.
    steps: taken, shape ``[]``, int32.
    ascents: steps that took both gradients, shape ``[]``, int32.
  """

  inner: Any
  mean: jax.Array
  steps: jax.Array
  ascents: jax.Array


def gated(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent whose state also holds what :func:`gated_step` keeps."""

  def init_fn(params):
    zero = jnp.zeros([], jnp.int32)
    return GateState(inner.init(params), jnp.zeros([]), zero, zero)

  return optax.GradientTransformation(init_fn, inner.update)


def gated_step(
  loss_fn: Callable[..., Any], **options: Any
) -> Callable[[Any, Any], Any]:
  """A step that ascends where the gradient is longer than it used to be.

  Where its squared norm is above the moving average of those before (decay 0.9,
  that of the first step at first), as in AE-SAM (Jiang et al., `An Adaptive
  Policy to Employ Sharpness-Aware Minimization
  <https://arxiv.org/abs/2304.14647>`_, 2023) with a threshold of no standard
  deviations. Many runs at once take both gradients always, and use one; what
  would be paid is in the count of the ascents. The loss draws nothing.
  """
  del options

  def step(state, batch):
    pass_at = jax.value_and_grad(
      lambda params: loss_fn(params, state.model_state, batch, None),
      has_aux=True,
    )
    inner, mean, steps, ascents = state.perturbation_state
    (loss, (model_state, _)), gradient = pass_at(state.params)
    square = optax.tree.norm(gradient, squared=True)
    mean = jnp.where(steps == 0, square, mean)
    ascends = square > mean
    epsilon, inner = state.perturbation.update(gradient, inner, state.params)
    epsilon = jax.tree.map(lambda x: jnp.where(ascends, x, 0), epsilon)
    _, gradient = pass_at(optax.tree.add(state.params, epsilon))
    kept = GateState(
      inner, 0.9 * mean + 0.1 * square, steps + 1, ascents + ascends
    )
    state = state.apply_gradients(
      grads=gradient, perturbation_state=kept, model_state=model_state
    )
    return state, {"loss": loss}

  return step

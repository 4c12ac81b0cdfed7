"""Ascent directions for study: the parts of F-SAM's, and its controls.

Perturbations in the place of those of the library, and a train step that gives
them what they need: gradients on other rows than the batch's. They cost more
than F-SAM, or do worse; that is what they are here to show.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

import fsam_optax


class EmaState(NamedTuple):
  """State of :func:`gradient_ema`: the average, in the tree of the parameters.

  Attributes:
    count: gradients taken in, shape ``[]``, int32.
    ema: the average.
  """

  count: jax.typing.ArrayLike
  ema: Any


class RandomState(NamedTuple):
  """State of :func:`random_direction`.

  Attributes:
    key: a key of the run's own.
    count: directions drawn, shape ``[]``, int32.
  """

  key: jax.Array
  count: jax.typing.ArrayLike


def full_gradient() -> optax.GradientTransformationExtraArgs:
  """The gradient on all training rows, in the place of the batch's."""
  return _of_gradients(lambda own, on: on("whole"))


def gradient_noise() -> optax.GradientTransformationExtraArgs:
  """The batch's gradient minus that on all training rows."""
  return _of_gradients(lambda own, on: optax.tree.sub(own, on("whole")))


def other_gradient() -> optax.GradientTransformationExtraArgs:
  """The gradient of another batch at the same parameters."""
  return _of_gradients(lambda own, on: on("other"))


def _of_gradients(direction: Callable[[Any, Any], Any]):
  """A direction from the batch's gradient and from those on other rows."""

  def update_fn(updates, state, params=None, **extra_args):
    del params
    return direction(updates, extra_args["gradient_on"]), state

  return optax.GradientTransformationExtraArgs(
    lambda params: optax.EmptyState(), update_fn
  )


def gradient_ema(lmbda: Any) -> optax.GradientTransformation:
  """The moving average that F-SAM subtracts, alone."""

  def init_fn(params):
    return EmaState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

  def update_fn(updates, state, params=None):
    del params
    is_first = state.count == 0
    ema = jax.tree.map(
      lambda m, g: jnp.where(is_first, g, m), state.ema, updates
    )
    new = jax.tree.map(lambda m, g: lmbda * m + (1 - lmbda) * g, ema, updates)
    return ema, EmaState(optax.safe_increment(state.count), new)

  return optax.GradientTransformation(init_fn, update_fn)


def previous_gradient() -> optax.GradientTransformation:
  """What it was given at the update before, in the place of the gradient."""
  return optax.GradientTransformation(
    lambda params: optax.tree.zeros_like(params),
    lambda updates, state, params=None: (state, updates),
  )


def random_direction() -> optax.GradientTransformation:
  """Standard normal numbers in the place of the gradient.

  The key is taken from the initial parameters, so that each run draws its own.
  """

  def init_fn(params):
    total = optax.tree.sum(params)
    seed = jax.lax.bitcast_convert_type(
      jnp.asarray(total, jnp.float32), jnp.uint32
    )
    return RandomState(jax.random.key(seed), jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    del params
    key = jax.random.fold_in(state.key, state.count)
    noise = optax.tree.random_like(key, updates, jax.random.normal)
    return noise, state._replace(count=optax.safe_increment(state.count))

  return optax.GradientTransformation(init_fn, update_fn)


def along(
  direction: optax.GradientTransformation, rho: Any
) -> optax.GradientTransformation:
  """The perturbation of norm ``rho`` along a direction."""
  return optax.chain(direction, fsam_optax.scale_to_radius(rho))


def make_step(
  loss_fn: Callable[..., Any], **options: Any
) -> Callable[[Any, Any], Any]:
  """The two-pass step, for perturbations that want gradients on other rows."""
  del options

  def step(state, batch):
    pass_on = lambda params, rows: jax.value_and_grad(
      lambda params: loss_fn(params, state.model_state, rows, None)[0]
    )(params)
    loss, gradient = pass_on(state.params, batch)
    perturbation = optax.with_extra_args_support(state.perturbation)
    epsilon, perturbation_state = perturbation.update(
      gradient,
      state.perturbation_state,
      state.params,
      gradient_on=lambda name: pass_on(state.params, batch[name])[1],
    )
    _, gradient = pass_on(optax.apply_updates(state.params, epsilon), batch)
    state = state.apply_gradients(
      grads=gradient, perturbation_state=perturbation_state
    )
    return state, {"loss": loss}

  return step

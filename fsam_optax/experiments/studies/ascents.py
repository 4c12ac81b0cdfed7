"""Ascents that the library does not have: parts, controls and cheap forms.

Perturbations in the place of those of the library, and two train steps that
take the arguments of :func:`fsam_optax.make_train_step`, of which they ignore
the options. Most cost more than F-SAM, or do worse; that is what they are here
to show.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional

import jax
from jax import numpy as jnp
import optax

import fsam_optax


class MemoryState(NamedTuple):
  """State of :func:`with_memory`.

  Attributes:
    count: gradients taken in, shape ``[]``, int32.
    inner: state of the ascent.
    memory: what is remembered.
  """

  count: Any
  inner: Any
  memory: Any


def with_memory(
  inner: optax.GradientTransformation,
  start: Callable[[Any], Any],
  change: Optional[Callable[..., tuple[Any, Any]]] = None,
) -> optax.GradientTransformationExtraArgs:
  """An ascent that remembers, and may do something else by what it remembers.

  Args:
    inner: the ascent.
    start: from the parameters to the memory before the first step.
    change: from the memory, the number of the step, the gradient, the ascent by
      it and the ``gradient_on`` of :func:`step_on_other_rows`, to the ascent
      instead and the memory after; None where a step writes the memory.

  Returns:
    The transformation.
  """

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    return MemoryState(count, inner.init(params), start(params))

  def update_fn(updates, state, params=None, **extra_args):
    count, inner_state, memory = state
    ascent, inner_state = inner.update(updates, inner_state, params)
    if change is not None:
      others = extra_args.get("gradient_on")
      ascent, memory = change(memory, count, updates, ascent, others)
    count = optax.safe_increment(count)
    return ascent, MemoryState(count, inner_state, memory)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def along(
  direction: optax.GradientTransformation, rho: Any
) -> optax.GradientTransformation:
  """The perturbation of norm ``rho`` along a direction."""
  return optax.chain(direction, fsam_optax.scale_to_radius(rho))


# Directions: by gradients on other rows, for `step_on_other_rows`.


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
  return with_memory(
    optax.identity(),
    lambda params: None,
    lambda memory, count, own, ascent, gradient_on: (
      direction(own, gradient_on),
      memory,
    ),
  )


# Directions: by the gradients of before, or by none.


def gradient_ema(lmbda: Any) -> optax.GradientTransformation:
  """The moving average that F-SAM subtracts, alone."""

  def change(ema, count, gradient, *_):
    ema = jax.tree.map(lambda m, g: jnp.where(count == 0, g, m), ema, gradient)
    mix = lambda m, g: lmbda * m + (1 - lmbda) * g
    return ema, jax.tree.map(mix, ema, gradient)

  return with_memory(optax.identity(), optax.tree.zeros_like, change)


def previous_gradient() -> optax.GradientTransformation:
  """What it was given at the update before, in the place of the gradient."""
  return with_memory(
    optax.identity(),
    optax.tree.zeros_like,
    lambda memory, count, given, *_: (memory, given),
  )


def random_direction() -> optax.GradientTransformation:
  """Standard normal numbers in the place of the gradient.

  The key is taken from the initial parameters, so that each run draws its own.
  """

  def start(params):
    total = jnp.asarray(optax.tree.sum(params), jnp.float32)
    return jax.random.key(jax.lax.bitcast_convert_type(total, jnp.uint32))

  def change(key, count, gradient, *_):
    drawn = jax.random.fold_in(key, count)
    return optax.tree.random_like(drawn, gradient, jax.random.normal), key

  return with_memory(optax.identity(), start, change)


# Cheap forms.


def hold(
  inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
  """The inner perturbation at every k-th step, and again until the next."""

  def change(held, count, gradient, ascent, _):
    del gradient
    is_fresh = count % every == 0
    held = jax.tree.map(lambda x, y: jnp.where(is_fresh, x, y), ascent, held)
    return held, held

  fresh = optax.conditionally_transform(
    inner, lambda step, **_: jnp.asarray(step) % every == 0
  )
  return with_memory(fresh, optax.tree.zeros_like, change)


def gated(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent where the gradient is longer than it used to be.

  Where its squared norm is above the moving average of those before (decay 0.9,
  that of the first step at first), as in AE-SAM (Jiang et al., `An Adaptive
  Policy to Employ Sharpness-Aware Minimization
  <https://arxiv.org/abs/2304.14647>`_, 2023) with a threshold of no standard
  deviations. Elsewhere the perturbation is zero: many runs at once take both
  gradients always. What would be paid is in the memory, the average and how
  many steps ascended.
  """

  def change(memory, count, gradient, ascent, _):
    mean, ascents = memory
    square = optax.tree.norm(gradient, squared=True)
    mean = jnp.where(count == 0, square, mean)
    ascends = square > mean
    ascent = jax.tree.map(lambda x: jnp.where(ascends, x, 0), ascent)
    return ascent, (0.9 * mean + 0.1 * square, ascents + ascends)

  start = lambda params: (jnp.zeros([]), jnp.zeros([], jnp.int32))
  return with_memory(inner, start, change)


def parallel(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent whose memory is the auxiliary gradient of its step."""
  return with_memory(inner, optax.tree.zeros_like)


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
    pass_at = _pass(loss_fn, state, batch)
    last = state.perturbation_state.memory
    epsilon, after = state.perturbation.update(
      last, state.perturbation_state, state.params
    )
    auxiliary = optax.tree.add_scale(state.params, -batch["rate"], last)
    loss, auxiliary = pass_at(auxiliary)
    _, perturbed = pass_at(optax.tree.add(state.params, epsilon))
    mix = lambda a, b: fraction * a + (1 - fraction) * b
    state = state.apply_gradients(
      grads=jax.tree.map(mix, auxiliary, perturbed),
      perturbation_state=after._replace(memory=auxiliary),
    )
    return state, {"loss": loss}

  return step


def step_on_other_rows(
  loss_fn: Callable[..., Any], **options: Any
) -> Callable[[Any, Any], Any]:
  """The two-pass step, for perturbations that want gradients on other rows."""
  del options

  def step(state, batch):
    loss, gradient = _pass(loss_fn, state, batch)(state.params)
    perturbation = optax.with_extra_args_support(state.perturbation)
    epsilon, perturbation_state = perturbation.update(
      gradient,
      state.perturbation_state,
      state.params,
      gradient_on=lambda name: _pass(loss_fn, state, batch[name])(state.params)[
        1
      ],
    )
    perturbed = optax.apply_updates(state.params, epsilon)
    _, gradient = _pass(loss_fn, state, batch)(perturbed)
    state = state.apply_gradients(
      grads=gradient, perturbation_state=perturbation_state
    )
    return state, {"loss": loss}

  return step


def _pass(loss_fn: Callable[..., Any], state: Any, batch: Any) -> Any:
  """The loss and its gradient on a batch, as a function of the parameters."""
  return jax.value_and_grad(
    lambda params: loss_fn(params, state.model_state, batch, None)[0]
  )

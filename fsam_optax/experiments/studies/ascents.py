"""Ascents that the library does not have: parts, controls and cheap forms.

Perturbations, and a train step that gives them gradients on other rows. Most
cost more than F-SAM, or do worse; that is what they are here to show.
"""

import functools
from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import optax

import fsam_optax


class MemoryState(NamedTuple):
  count: Any
  inner: Any
  memory: Any


def with_memory(
  inner: optax.GradientTransformation,
  start: Callable[[Any], Any],
  change: Callable[..., tuple[Any, Any]],
) -> optax.GradientTransformationExtraArgs:
  """An ascent that remembers, and may do something else by what it remembers.

  ``start`` makes the memory from the parameters. ``change`` takes the memory,
  the number of the step, the gradient, the ascent by it and the ``gradient_on``
  of :func:`step_on_other_rows`; it returns another ascent and the memory.
  """

  def init_fn(params):
    count = jnp.zeros([], jnp.int32)
    return MemoryState(count, inner.init(params), start(params))

  def update_fn(updates, state, params=None, **extra_args):
    count, inner_state, memory = state
    ascent, inner_state = inner.update(updates, inner_state, params)
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


def full_gradient() -> optax.GradientTransformationExtraArgs:
  """The gradient on all training rows; for :func:`step_on_other_rows`."""
  return with_memory(
    optax.identity(),
    lambda params: None,
    lambda memory, count, own, ascent, gradient_on: (
      gradient_on("whole"),
      memory,
    ),
  )


def other_noise(lmbda: Any) -> optax.GradientTransformationExtraArgs:
  """The gradient of another batch minus the average that F-SAM subtracts.

  For :func:`step_on_other_rows`.
  """

  def change(ema, count, own, ascent, gradient_on):
    del ascent
    other, mixed = gradient_on("other"), _mixed(ema, own, count, lmbda)
    return optax.tree.sub(other, ema), mixed

  return with_memory(optax.identity(), optax.tree.zeros_like, change)


def gradient_ema(lmbda: Any) -> optax.GradientTransformation:
  """The moving average of the gradients, the batch's among them, alone.

  It is VaSSO's direction (Li and Giannakis, `Enhancing Sharpness-Aware
  Optimization Through Variance Suppression
  <https://arxiv.org/abs/2309.15639>`_, 2023), by ``theta = 1 - lmbda``.
  """

  def change(ema, count, gradient, *_):
    mixed = _mixed(ema, gradient, count, lmbda)
    return mixed, mixed

  return with_memory(optax.identity(), optax.tree.zeros_like, change)


def _mixed(ema: Any, gradient: Any, count: jax.Array, lmbda: Any) -> Any:
  decay = jnp.where(count == 0, 0.0, lmbda)
  return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ema, gradient)


def previous_gradient() -> optax.GradientTransformation:
  """The gradient of the update before."""
  return with_memory(
    optax.identity(),
    optax.tree.zeros_like,
    lambda memory, count, given, *_: (memory, given),
  )


def random_direction() -> optax.GradientTransformation:
  """Standard normal numbers, by a key from the initial parameters."""

  def start(params):
    total = jnp.asarray(optax.tree.sum(params), jnp.float32)
    return jax.random.key(jax.lax.bitcast_convert_type(total, jnp.uint32))

  def change(key, count, gradient, *_):
    drawn = jax.random.fold_in(key, count)
    return optax.tree.random_like(drawn, gradient, jax.random.normal), key

  return with_memory(optax.identity(), start, change)


def gated(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """An ascent where the squared norm of the gradient is above its average.

  That is AE-SAM (Jiang et al., `An Adaptive Policy to Employ Sharpness-Aware
  Minimization <https://arxiv.org/abs/2304.14647>`_, 2023) with a threshold of
  no standard deviations and a decay of 0.9. Elsewhere the perturbation is zero.
  The memory is the average, and how many steps ascended.
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


def step_on_other_rows(
  loss_fn: Callable[..., Any], **options: Any
) -> Callable[[Any, Any], Any]:
  """The two-pass step, for perturbations that want gradients on other rows."""
  del options
  return functools.partial(_step, loss_fn, lambda batch: batch, "ascent")


def step_by_all_statistics(
  loss_fn: Callable[..., Any], *, ascent_fraction: float, **options: Any
) -> Callable[[Any, Any], Any]:
  """The step of ``ascent_fraction=1/q`` and ``ema_gradient="descent"``.

  Its first pass is on the whole batch, whose statistics normalize the rows
  that the gradient is of.
  """
  del options

  def some(batch):
    is_first = jnp.arange(len(batch["y"])) % round(1 / ascent_fraction) == 0
    return {**batch, "where": is_first}

  return functools.partial(_step, loss_fn, some, "descent")


def _step(loss_fn, first_rows, ema_gradient, state, batch):
  """Both passes of a step, the first of them on ``first_rows(batch)``."""

  def on(params, batch):
    of = lambda params: loss_fn(params, state.model_state, batch, None)
    return jax.value_and_grad(of, has_aux=True)(params)

  update = functools.partial(
    optax.with_extra_args_support(state.perturbation).update,
    state=state.perturbation_state,
    params=state.params,
    gradient_on=lambda name: on(state.params, batch[name])[1],
  )
  (loss, (model_state, _)), gradient = on(state.params, first_rows(batch))
  epsilon, perturbation_state = update(gradient)
  _, gradient = on(optax.apply_updates(state.params, epsilon), batch)
  if ema_gradient == "descent":
    _, perturbation_state = update(gradient)
  state = state.apply_gradients(
    grads=gradient,
    perturbation_state=perturbation_state,
    model_state=model_state,
  )
  return state, {"loss": loss}

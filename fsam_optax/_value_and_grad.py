"""The two passes: a sharpness-aware drop-in for `jax.value_and_grad`."""

from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen


class SharpnessInfo(NamedTuple):
  """What the two passes saw, scalars of shape ``[]``.

  Compiled, a field that nobody reads is not computed.

  Attributes:
    perturbed_value: loss at the perturbed parameters, dtype of the loss. Minus
      the loss it is the sharpness.
    gradient_norm: Euclidean norm of the gradient at the clean parameters.
    direction_norm: the norm that the radius was divided by; of the gradient
      minus the average for F-SAM, of its product with the absolute weights
      where the perturbation is adaptive. Not finite where the gradient was not.
    perturbation_norm: Euclidean norm of the perturbation.
    gradient_ema_cosine: cosine between the gradient and the moving average that
      is subtracted from it; 0 where there is none or one of them is zero.
  """

  perturbed_value: jax.Array
  gradient_norm: jax.Array
  direction_norm: jax.Array
  perturbation_norm: jax.Array
  gradient_ema_cosine: jax.Array


def value_and_grad(
  loss_fn: Callable[..., Any],
  perturbation: optax.GradientTransformation,
  *,
  has_aux: bool = False,
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState, SharpnessInfo]]:
  r"""Value at the parameters, gradient at the perturbed parameters.

  .. math::

    L_B(w) \quad\text{and}\quad \nabla L_B(w + \epsilon), \qquad
    \epsilon = \text{perturbation}(\nabla L_B(w))

  A drop-in for :func:`jax.value_and_grad` that fits any optimizer, the
  wrappers of optax included: what it returns is a gradient like any other.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp
    >>> loss_fn = lambda w, batch: jnp.mean((batch @ w) ** 2)
    >>> perturbation = fsam_optax.friendly_perturbation(rho=0.1)
    >>> fn = fsam_optax.value_and_grad(loss_fn, perturbation)
    >>> params, batch = jnp.ones(2), jnp.eye(2)
    >>> loss, grads, state, info = fn(params, perturbation.init(params), batch)
    >>> print(f"{loss:.2f} {info.perturbed_value:.2f}")
    1.00 1.15

  Args:
    loss_fn: ``loss_fn(params, batch, *args)`` returns the loss, a real scalar,
      or with ``has_aux`` the pair ``(loss, aux)``.
    perturbation: a transformation from gradients to perturbations, such as
      :func:`friendly_perturbation` or :func:`sam_perturbation`.
    has_aux: whether ``loss_fn`` returns auxiliary data beside the loss.

  Returns:
    A function ``fn(params, perturbation_state, batch, *args)`` that returns
    ``(value, grads, perturbation_state, info)``. ``value`` is the loss, or
    ``(loss, aux)``, of the first pass, at ``params``. ``grads`` has the tree,
    shapes and dtypes of ``params``. ``info`` is a :class:`SharpnessInfo`. Both
    passes get the same ``batch`` and ``args``, so the same dropout key.

  Raises:
    TypeError: at call, if the loss is not a real scalar, or ``loss_fn`` does
      not return a pair although ``has_aux`` promises one.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """

  def checked_loss_fn(params, batch, *args):
    output = loss_fn(params, batch, *args)
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
      raise TypeError(
        "`loss_fn` must return a pair (loss, aux) when `has_aux=True`, got "
        f"{type(output).__name__}."
      )
    loss, aux = output if has_aux else (output, None)
    _check_loss(loss)
    return loss, aux

  grad_fn = jax.value_and_grad(checked_loss_fn, has_aux=True)

  def fn(params, perturbation_state, batch, *args):
    (loss, aux), gradient = grad_fn(params, batch, *args)
    epsilon, new_state = perturbation.update(
      gradient, perturbation_state, params
    )
    (perturbed_loss, _), perturbed_gradient = grad_fn(
      optax.apply_updates(params, epsilon), batch, *args
    )
    info = _info(
      perturbed_loss, gradient, epsilon, perturbation_state, new_state
    )
    value = (loss, aux) if has_aux else loss
    return value, perturbed_gradient, new_state, info

  return fn


def _info(
  perturbed_value, gradient, epsilon, state, new_state
) -> SharpnessInfo:
  """Gathers the scalars, from the state where it has them."""
  radius_state = _find(ScaleToRadiusState, new_state)
  if radius_state is None:  # Not one of ours: measure.
    direction_norm = global_norm(gradient)
    perturbation_norm = global_norm(epsilon)
  else:
    direction_norm = radius_state.direction_norm
    perturbation_norm = radius_state.perturbation_norm
  ema_state = _find(SubtractGradientEmaState, state)
  return SharpnessInfo(
    perturbed_value=perturbed_value,
    gradient_norm=global_norm(gradient),
    direction_norm=direction_norm,
    perturbation_norm=perturbation_norm,
    gradient_ema_cosine=(
      jnp.zeros_like(direction_norm)
      if ema_state is None
      else _cosine(ema_state.ema, gradient)
    ),
  )


def _find(state_type, state):
  """The first state of this type inside a nested optimizer state."""
  is_found = lambda x: isinstance(x, state_type)
  leaves = jax.tree.leaves(state, is_leaf=is_found)
  return next(filter(is_found, leaves), None)


def _cosine(ema, gradient):
  """Cosine over the leaves that `ema` holds; 0 if either side is zero."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  gradient = jax.tree.map(
    lambda m, g: m if is_masked(m) else g, ema, gradient, is_leaf=is_masked
  )
  inner = optax.tree.sum(
    jax.tree.map(
      lambda m, g: jnp.sum(jnp.real(jnp.conj(widen(m)) * widen(g))),
      ema,
      gradient,
    )
  )
  norms = global_norm(ema) * global_norm(gradient)
  return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), 0.0)


def _check_loss(loss):
  shape, dtype = jnp.shape(loss), jnp.result_type(loss)
  if shape or not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      "`loss_fn` must return the loss as a real scalar, got "
      f"{dtype}{list(shape)}. Take the mean over the batch; return other "
      "outputs as aux, with `has_aux=True`."
    )

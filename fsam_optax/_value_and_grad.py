"""The two passes: a sharpness-aware drop-in for `jax.value_and_grad`."""

from typing import Any, Callable, Unpack

import optax

from fsam_optax._loss import check_loss_fn
from fsam_optax._loss import loss_and_aux
from fsam_optax._options import Options
from fsam_optax._options import PassOptions
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbed_weights import find_state
from fsam_optax._two_passes import SharpnessInfo
from fsam_optax._two_passes import two_passes


def value_and_grad(
  loss_fn: Callable[..., Any],
  perturbation: optax.GradientTransformation,
  *,
  has_aux: bool = False,
  **options: Unpack[PassOptions],
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState, SharpnessInfo]]:
  r"""Value at the parameters, gradient at the perturbed parameters.

  .. math::

    L_B(w) \quad\text{and}\quad \nabla L_B(w + \epsilon), \qquad
    \epsilon = \text{perturbation}(\nabla L_B(w))

  A drop-in for :func:`jax.value_and_grad`. It fits any optimizer and any
  wrapper of optax, because it returns an ordinary gradient.

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
    loss_fn: ``loss_fn(params, *args, **kwargs)`` returns the loss, a real
      scalar, or with ``has_aux`` the pair ``(loss, aux)``. With an option that
      splits rows, the first of ``args`` must be the batch, a tree of arrays of
      shape ``[B, ...]``.
    perturbation: a transformation from gradients to perturbations, such as
      :func:`friendly_perturbation` or :func:`sam_perturbation`.
    has_aux: whether ``loss_fn`` returns auxiliary data beside the loss.
    **options: see :class:`~fsam_optax._options.PassOptions`.

  Returns:
    A function ``fn(params, perturbation_state, *args, optimizer_state=None,
    **kwargs)`` that returns ``(value, grads, perturbation_state, info)``.
    ``value`` is the loss, or ``(loss, aux)``, of the first pass, at ``params``.
    ``grads`` has the tree, shapes and dtypes of ``params``, and follows the
    convention of :func:`jax.grad` for complex parameters. ``info`` is a
    :class:`SharpnessInfo`. ``optimizer_state`` is the state of the optimizer
    before its update, for a perturbation with ``average="optimizer"``; the loss
    does not get it. Both passes and all micro-batches get the same arguments
    beside the batch, so the same dropout key. The loss is traced once for all
    of them (with ``ascent_fraction`` once for each number of rows), so what its
    Python code draws or pops, it draws or pops once. The gates count the
    perturbation's updates as steps.

  Raises:
    TypeError: if an argument is of a wrong type, or an option is unknown; at
      call, if the loss is not a real scalar, ``loss_fn`` does not return a pair
      with ``has_aux``, an aux that must be averaged is not a floating scalar,
      ``weight`` is not in the aux, or a parameter is not floating.
    ValueError: if an option is out of its range; at call, if ``axis_name`` is
      not bound, the batch is empty, missing where an option splits it, or does
      not split evenly into micro-batches or the ascent's fraction, the state
      does not fit the parameters, ``optimizer_state`` does not fit
      ``average="optimizer"``, a gate is set and the perturbation counts no
      updates, or, uncompiled, ``checked`` finds a mistake.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  check_loss_fn(loss_fn)
  check_perturbation(perturbation)
  chosen = Options.from_keywords(options)

  def fn(params, perturbation_state, *args, optimizer_state=None, **kwargs):
    batch = args[0] if args else None

    def loss_of_part(params, part, index, carry):
      del index
      arguments = (part, *args[1:]) if args else ()
      output = loss_fn(params, *arguments, **kwargs)
      loss, aux = loss_and_aux(output, has_aux)
      return loss, (carry, aux)

    radius_state = find_state(ScaleToRadiusState, perturbation_state)
    outcome = two_passes(
      perturbation,
      chosen,
      loss_of_part,
      params,
      perturbation_state,
      batch,
      step=None if radius_state is None else radius_state.count,
      optimizer_state=optimizer_state,
    )
    value = (outcome.loss, outcome.aux) if has_aux else outcome.loss
    return value, outcome.grads, outcome.advance(), outcome.info

  return fn

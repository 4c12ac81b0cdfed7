"""The optax interface: F-SAM as a link of `optax.chain`."""

from typing import Callable, Optional

import jax
from jax import numpy as jnp
import optax

from fsam_optax._perturbation import Mask
from fsam_optax._perturbation import Order
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import friendly_perturbation


def sharpness_aware(
  perturbation: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Replaces the gradient by the one at the perturbed parameters.

  .. math::

    g_t \mapsto \nabla L_{B_t}(w_t + \epsilon_t)

  where :math:`\epsilon_t` is what ``perturbation`` makes of the mini-batch
  gradient :math:`g_t` at the parameters :math:`w_t`.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp, optax
    >>> sam = fsam_optax.sharpness_aware(fsam_optax.sam_perturbation(rho=0.1))
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> params = jnp.array([3.0, 4.0])
    >>> updates, state = sam.update(
    ...   grad_fn(params), sam.init(params), params, grad_fn=grad_fn
    ... )
    >>> print(updates)
    [6.12 8.16]

  Args:
    perturbation: a transformation from gradients to perturbations, such as
      :func:`friendly_perturbation` or :func:`sam_perturbation`.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs`. Its ``update(updates,
    state, params, *, grad_fn, **extra_args)`` takes the gradient at ``params``
    as ``updates`` and calls ``grad_fn`` once. Its state is that of
    ``perturbation``.

  Raises:
    TypeError: if ``perturbation`` is no gradient transformation; at update, if
      ``grad_fn`` is not callable.
    ValueError: at update, if ``params`` or ``grad_fn`` is missing, if
      ``params`` is only a part of the parameters because of a wrapper such as
      :func:`optax.masked`, or if ``grad_fn`` returns another structure, other
      shapes or other dtypes than ``updates`` has.

  .. note::
    ``grad_fn`` takes the parameters alone and returns their gradient on the
    same batch, with the same dropout key. That of :func:`optax.contrib.sam`
    takes a second argument. It receives the perturbed parameters of the network
    that this optimizer owns; whatever else its loss reads, such as another
    network, it sees unperturbed.
  """

  check_perturbation(perturbation)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    grad_fn: Optional[Callable[[optax.Params], optax.Updates]] = None,
    **extra_args,
  ):
    del extra_args
    if params is None:
      raise ValueError(
        "`params` must be given, got None. Call `update(grads, state, params, "
        "grad_fn=grad_fn)`."
      )
    _check_complete(params)
    if grad_fn is None:
      raise ValueError(
        "`grad_fn` must be given, got None. Call `update(grads, state, params, "
        "grad_fn=lambda p: jax.grad(loss)(p, batch))`. Where the train step "
        "takes both gradients, give it `friendly_perturbation`, not `fsam`."
      )
    if not callable(grad_fn):
      raise TypeError(
        "`grad_fn` must be callable, a function of the parameters that returns "
        f"their gradient, got {type(grad_fn).__name__}."
      )
    epsilon, state = perturbation.update(updates, state, params)
    perturbed_updates = grad_fn(optax.apply_updates(params, epsilon))
    _check_like(perturbed_updates, updates)
    return perturbed_updates, state

  return optax.GradientTransformationExtraArgs(perturbation.init, update_fn)


def fsam(
  rho: optax.ScalarOrSchedule = 0.05,
  sigma: optax.ScalarOrSchedule = 1.0,
  lmbda: optax.ScalarOrSchedule = 0.9,
  *,
  adaptive: bool = False,
  mask: Mask = None,
  order: Order = "official",
  accumulator_dtype: Optional[jax.typing.DTypeLike] = None,
  eta: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
  r"""Friendly Sharpness-Aware Minimization, the first link of a chain.

  .. math::

    \begin{align*}
      d_t &= g_t - \sigma m_{t-1}, \\
      m_t &= \lambda m_{t-1} + (1 - \lambda) g_t, \\
      \epsilon_t &= \rho \frac{d_t}{\lVert d_t \rVert + 10^{-12}}, \\
      u_t &= \nabla L_{B_t}(w_t + \epsilon_t),
    \end{align*}

  with :math:`d_0 = g_0` and :math:`m_0 = g_0`. :math:`\rho` is ``rho``,
  :math:`\sigma` is ``sigma``, :math:`\lambda` is ``lmbda``, and :math:`u_t` is
  what the base optimizer behind it in the chain receives.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp, optax
    >>> tx = optax.chain(fsam_optax.fsam(rho=0.05), optax.sgd(0.1))
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> params = jnp.array([3.0, 4.0])
    >>> state = tx.init(params)
    >>> for _ in range(20):
    ...   updates, state = tx.update(
    ...     grad_fn(params), state, params, grad_fn=grad_fn
    ...   )
    ...   params = optax.apply_updates(params, updates)
    >>> print(bool(jnp.all(jnp.abs(params) < 0.1)))
    True

  Args:
    rho: radius, finite and non-negative. The paper uses 0.05 to 0.2.
    sigma: fraction of the average that is subtracted, finite and non-negative;
      0 is SAM.
    lmbda: decay of the average, in ``[0, 1]``. The paper uses 0.6, 0.9, 0.95.
    adaptive: whether to measure the radius in the metric of ASAM.
    mask: which leaves to perturb, see :func:`friendly_perturbation`. Under
      :func:`optax.inject_hyperparams` a callable mask is a static argument.
    order: ``"official"`` or ``"paper"``, see :func:`subtract_gradient_ema`.
    accumulator_dtype: dtype of the average; ``None`` for that of the
      parameters.
    eta: added to the absolute weights when adaptive, see
      :func:`scale_to_radius`.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs`, see
    :func:`sharpness_aware` for the ``grad_fn`` that its update needs.

  Raises:
    TypeError: if a hyperparameter is neither a real scalar nor callable.
    ValueError: if a hyperparameter is out of its range; at update, see
      :func:`sharpness_aware`.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024

  .. warning::
    Put gradient clipping behind it in the chain. In front, it changes the
    gradient against the average of the gradients. Inside
    :class:`optax.MultiSteps`, ``grad_fn`` sees the last micro-batch alone.
  """
  return sharpness_aware(
    friendly_perturbation(
      rho,
      sigma,
      lmbda,
      adaptive=adaptive,
      mask=mask,
      order=order,
      accumulator_dtype=accumulator_dtype,
      eta=eta,
    )
  )


def _check_complete(params: optax.Params):
  """Raises where a wrapper has cut leaves out of `params`."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
    raise ValueError(
      "`params` must hold every parameter of the model, got masked nodes: "
      "`grad_fn` cannot run on a part. Instead of wrapping a chain that holds "
      "`fsam` in optax.masked, optax.partition or optax.multi_transform, put "
      "`fsam(mask=...)` first and wrap what follows, or use the two-pass "
      "`fsam_optax.value_and_grad` with any optimizer."
    )


def _check_like(updates: optax.Updates, reference: optax.Updates):
  """Raises unless both trees agree in structure, shapes and dtypes."""
  got, expected = jax.tree.structure(updates), jax.tree.structure(reference)
  if got != expected:
    raise ValueError(
      "`grad_fn` must return gradients of the structure of `updates`, "
      f"{expected}, got {got}. It takes the parameters alone and returns "
      "nothing but their gradient: with `has_aux` or `value_and_grad`, pick "
      "the gradient out."
    )
  for (path, g), r in zip(
    jax.tree_util.tree_leaves_with_path(updates),
    jax.tree.leaves(reference),
    strict=True,
  ):
    if jnp.shape(g) != jnp.shape(r) or jnp.result_type(g) != jnp.result_type(r):
      raise ValueError(
        "`grad_fn` must return gradients of the shapes and dtypes of "
        f"`updates`, got {jnp.result_type(g)}{list(jnp.shape(g))} for "
        f"{jnp.result_type(r)}{list(jnp.shape(r))} at "
        f"{jax.tree_util.keystr(path) or 'the root'}. Take both gradients with "
        "the same function."
      )

"""The two passes: a sharpness-aware drop-in for `jax.value_and_grad`."""

from typing import Any, Callable, Unpack

import optax

from fsam_optax._ascent import find_state
from fsam_optax._loss import check_loss_fn
from fsam_optax._loss import loss_and_aux
from fsam_optax._options import Options
from fsam_optax._options import PassOptions
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import check_perturbation
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
    loss_fn: ``loss_fn(params, *args, **kwargs)`` returns the loss, a real
      scalar, or with ``has_aux`` the pair ``(loss, aux)``. Only the options
      that split rows ask what the arguments are: then the first of ``args`` is
      the batch, a tree of arrays of shape ``[B, ...]``.
    perturbation: a transformation from gradients to perturbations, such as
      :func:`friendly_perturbation` or :func:`sam_perturbation`.
    has_aux: whether ``loss_fn`` returns auxiliary data beside the loss.
    **options: which replicas, rows and steps ascend, and along what:

      ``axis_name=None``: name of the axis of :func:`jax.pmap`,
      :func:`jax.shard_map` or :func:`jax.vmap` over which the replicas average
      loss and gradients, or a tuple of such names. None where nothing is
      to be averaged, as in a program compiled by :func:`jax.jit`, of which the
      arrays' shardings alone say where it runs. The aux is that of each
      replica.

      ``sync_perturbation=True``: whether all replicas and all micro-batches
      ascend along the mean gradient, so that N devices do what one does on the
      whole batch. False: each ascends along its own (m-sharpness). A name out
      of ``axis_name``, or a tuple of them: along the mean over the replicas on
      those axes, and over the micro-batches. The moving average is the same on
      all replicas in any case.

      ``ema_gradient="ascent"``: which gradient the moving average takes in:
      ``"ascent"``, the mean gradient at the clean parameters, or
      ``"descent"``, the mean gradient that is returned. With
      ``sync_perturbation=False`` the replicas then average one gradient a
      step, not two.

      ``num_microbatches=1``: number n of micro-batches that a batch of B rows
      is split into, one at a time in memory; row i goes to micro-batch i modulo
      n. Loss, aux and gradients are means over them, the state is updated once.
      The aux must then be floating scalars.

      ``weight=None``: name of the entry of ``aux``, then a dict, that says how
      much the rows of a micro-batch or replica count, such as its number of
      tokens: for a loss that divides by it. Loss, gradients and the rest of the
      aux are then weighted means, over all tokens, and that entry is the sum. A
      part that weighs nothing does not count, whatever its loss.

      ``ascent_fraction=1.0``: fraction of the rows, in (0, 1], that the first
      pass sees, for a step of 1 + ``ascent_fraction`` gradients. Of B rows (of
      this replica's, and of each micro-batch's) it takes every
      (1 / ``ascent_fraction``)-th.

      ``every=1``: ascend at every k-th step; at the steps between, the gradient
      is that of the first pass, the second is not computed, and the average
      moves on.

      ``start=0``: first step at which to ascend.

      ``stop=None``: first step at which to ascend no more; None for never.

      ``checked=False``: whether each call looks for what is wrong in a new
      loop, for another gradient and a call of the host: a loss that returns
      another value or gradient when it is called again; replicas of the same
      parameters whose averages differ, because ``axis_name`` is missing; a
      state that was not carried on. Uncompiled that is an error; compiled it is
      printed, and loss and gradient are NaN.

  Returns:
    A function ``fn(params, perturbation_state, *args, optimizer_state=None,
    **kwargs)`` that returns ``(value, grads, perturbation_state, info)``.
    ``optimizer_state`` is that of the optimizer before its update, for a
    perturbation with ``average="optimizer"``; the loss does not get it.
    ``value`` is the loss, or ``(loss, aux)``, of the first pass, at ``params``.
    ``grads`` has the tree,
    shapes and dtypes of ``params``, and is for complex ones the conjugate of
    the ascent, as :func:`jax.grad` has it. ``info`` is a
    :class:`SharpnessInfo`. Both passes, and all micro-batches, get the same
    arguments beside the batch, so the same dropout key. The step of the gates
    is the number of updates that the perturbation has counted.
    The loss is traced once for both passes and all micro-batches: what it draws
    or pops, it draws or pops once. With ``ascent_fraction`` it is traced for
    each number of rows.

    The first pass sees ``ascent_fraction`` of the rows, and ``value`` is still
    its: at the parameters that are trained, not beside them, and so without
    the bias of the perturbation, but of fewer rows. Its difference from
    ``info.perturbed_value`` then holds the difference between two samples of
    rows besides the sharpness, and tells only on the mean over steps. Where a
    gate skips the ascent, the one pass sees all rows.

  Raises:
    TypeError: if an argument is of a wrong type, or no option; at call, if the
      loss is not a real scalar, ``loss_fn`` does not return a pair although
      ``has_aux`` promises one, an aux that must be averaged is no floating
      scalar, a parameter is not floating, or rows are to be split and there is
      no batch.
    ValueError: if an option is out of its range; at call, if ``axis_name`` is
      not bound, if the batch is empty or does not split evenly into
      micro-batches or the ascent's fraction, if the state is not one of these
      parameters, if a gate is set and the perturbation counts no updates, or
      uncompiled if ``checked`` finds something.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  check_loss_fn(loss_fn)
  check_perturbation(perturbation)
  chosen = Options.from_keywords(options)

  def fn(params, perturbation_state, *args, optimizer_state=None, **kwargs):
    if chosen.splits_rows and not args:
      raise TypeError(
        "`batch` must be given when `num_microbatches` or `ascent_fraction` "
        "split its rows, got no argument after the perturbation's state. Call "
        "`fn(params, perturbation_state, batch)`."
      )
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

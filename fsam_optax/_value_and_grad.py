"""The two passes: a sharpness-aware drop-in for `jax.value_and_grad`."""

from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import widen


class SharpnessInfo(NamedTuple):
  """What the two passes saw, scalars of shape ``[]``.

  Compiled, a field that nobody reads is not computed.

  Attributes:
    perturbed_value: loss at the perturbed parameters, dtype of the loss. Minus
      the loss it is the sharpness. The loss itself where a gate skipped the
      ascent.
    gradient_norm: Euclidean norm of the gradient at the clean parameters.
    direction_norm: the norm that the radius was divided by; of the gradient
      minus the average for F-SAM, of its product with the absolute weights
      where the perturbation is adaptive. Not finite where the gradient was not.
    perturbation_norm: Euclidean norm of the perturbation; the mean over
      micro-batches where each has its own, 0 where a gate skipped the ascent.
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
  sync_perturbation: bool = True,
  num_microbatches: int = 1,
  every: int = 1,
  start: int = 0,
  stop: Optional[int] = None,
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
    sync_perturbation: with micro-batches, whether all of them are perturbed
      along the mean gradient, as one large batch would be; False perturbs each
      along its own gradient. The moving average takes in the mean either way.
    num_microbatches: number n of micro-batches that a batch of B rows is split
      into, one at a time in memory; row i goes to micro-batch i modulo n.
      Loss, aux and gradients are means over them, the state is updated once.
    every: ascend at every k-th step; at the steps between, the gradient is that
      of the first pass, the second is not computed, and the average moves on.
    start: first step at which to ascend.
    stop: first step at which to ascend no more; None for never.

  Returns:
    A function ``fn(params, perturbation_state, batch, *args)`` that returns
    ``(value, grads, perturbation_state, info)``. ``value`` is the loss, or
    ``(loss, aux)``, of the first pass, at ``params``. ``grads`` has the tree,
    shapes and dtypes of ``params``. ``info`` is a :class:`SharpnessInfo`. Both
    passes, and all micro-batches, get the same ``args``, so the same dropout
    key. The step of the gates is the number of updates that the perturbation
    has counted.

  Raises:
    TypeError: if an argument is of a wrong type; at call, if the loss is not a
      real scalar, ``loss_fn`` does not return a pair although ``has_aux``
      promises one, or a parameter is not floating.
    ValueError: if an option is out of its range; at call, if the batch is
      empty or does not split evenly into micro-batches, if the state is not
      one of these parameters, or if a gate is set and the perturbation counts
      no updates.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  check_loss_fn(loss_fn)
  passes = two_passes(
    perturbation,
    sync_perturbation=sync_perturbation,
    num_microbatches=num_microbatches,
    every=every,
    start=start,
    stop=stop,
  )

  def fn(params, perturbation_state, batch, *args):
    def loss_of_part(params, batch, index, carry):
      del index
      output = loss_fn(params, batch, *args)
      if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(
          "`loss_fn` must return a pair (loss, aux) when `has_aux=True`, got "
          + (
            f"{len(output)} values."
            if isinstance(output, tuple)
            else "one value."
          )
        )
      loss, aux = output if has_aux else (output, None)
      return loss, (carry, aux)

    radius_state = _find(ScaleToRadiusState, perturbation_state)
    loss, _, aux, grads, perturbation_state, info = passes(
      loss_of_part,
      params,
      perturbation_state,
      batch,
      step=None if radius_state is None else radius_state.count,
    )
    return (
      (loss, aux) if has_aux else loss,
      grads,
      perturbation_state,
      info,
    )

  return fn


def two_passes(
  perturbation: optax.GradientTransformation,
  *,
  sync_perturbation: bool = True,
  num_microbatches: int = 1,
  every: int = 1,
  start: int = 0,
  stop: Optional[int] = None,
) -> Callable[..., tuple[Any, ...]]:
  """The two passes over a loss that carries state from part to part.

  Args:
    perturbation: see :func:`value_and_grad`, as are the other options.
    sync_perturbation: as there.
    num_microbatches: as there.
    every: as there.
    start: as there.
    stop: as there.

  Returns:
    A function ``passes(loss_fn, params, perturbation_state, batch, carry=None,
    *, step=None, loss_scale=None)`` that returns ``(loss, carry, aux, grads,
    perturbation_state, info)``. ``loss_fn(params, part, index, carry)`` returns
    ``(loss, (carry, aux))`` for the part of the batch at ``index``; the carry
    returned is that of the first pass. The gradients are those of the loss
    times ``loss_scale``, divided by it again in float32 at least.
  """
  check_perturbation(perturbation)
  if not isinstance(sync_perturbation, bool):
    raise TypeError(
      f"`sync_perturbation` must be a bool, got {sync_perturbation!r}."
    )
  for name, value, least in (
    ("num_microbatches", num_microbatches, 1),
    ("every", every, 1),
    ("start", start, 0),
    ("stop", start if stop is None else stop, start),
  ):
    if isinstance(value, bool) or not isinstance(value, int):
      raise TypeError(f"`{name}` must be an int, got {value!r}.")
    if value < least:
      raise ValueError(f"`{name}` must be at least {least}, got {value}.")
  is_gated = every > 1 or start > 0 or stop is not None
  is_shut = stop is not None and stop <= start

  def passes(
    loss_fn,
    params,
    perturbation_state,
    batch,
    carry=None,
    *,
    step=None,
    loss_scale=None,
  ):
    _check_params(params)
    _check_batch(batch, num_microbatches)
    _check_state(perturbation, perturbation_state, params)
    is_active = None
    if is_shut:
      is_active = False
    elif is_gated:
      is_active = _is_active(step, every, start, stop)

    def value_grad(params, part, index, carry):
      def scaled(params):
        loss, (new_carry, aux) = loss_fn(params, part, index, carry)
        _check_loss(loss)
        scaled = loss if loss_scale is None else loss * loss_scale
        return scaled, (loss, new_carry, aux)

      grads, (loss, new_carry, aux) = jax.grad(scaled, has_aux=True)(params)
      if loss_scale is not None:
        scale = loss_scale
        grads = jax.tree.map(lambda g: widen(g) / scale, grads)
      return (loss, aux, grads), new_carry

    def perturb(gradient):
      # For complex parameters JAX's gradient is the conjugate of the ascent.
      return perturbation.update(
        jax.tree.map(jnp.conj, gradient), perturbation_state, params
      )

    def at_perturbed(epsilon, loss, gradient, second_pass):
      """Loss and gradient of the second pass, or the first's if gated."""
      if is_shut:
        return loss, gradient
      # Outside the branch, or it would hold the perturbation besides.
      perturbed = optax.apply_updates(params, epsilon)
      ascend = lambda: second_pass(perturbed)
      if is_active is None:
        return ascend()
      return jax.lax.cond(is_active, ascend, lambda: (loss, gradient))

    if num_microbatches == 1 or sync_perturbation:
      over = lambda fn, carry: _mean_over_parts(
        fn, batch, num_microbatches, carry
      )
      (loss, aux, gradient), new_carry = over(
        lambda *part: value_grad(params, *part), carry
      )
      epsilon, new_state = perturb(gradient)

      def second_pass(perturbed):
        def value_grad_again(*part):
          (loss, _, grads), new_carry = value_grad(perturbed, *part)
          return (loss, grads), new_carry

        return over(value_grad_again, carry)[0]

      perturbed_loss, grads = at_perturbed(epsilon, loss, gradient, second_pass)
      perturbation_norm = _perturbation_norm(epsilon, new_state)
    else:

      def both_passes(part, index, carry):
        (loss, aux, gradient), new_carry = value_grad(
          params, part, index, carry
        )
        epsilon, local_state = perturb(gradient)

        def second_pass(perturbed):
          loss, _, grads = value_grad(perturbed, part, index, carry)[0]
          return loss, grads

        perturbed_loss, grads = at_perturbed(
          epsilon, loss, gradient, second_pass
        )
        norm = _perturbation_norm(epsilon, local_state)
        return (loss, aux, gradient, perturbed_loss, grads, norm), new_carry

      means, new_carry = _mean_over_parts(
        both_passes, batch, num_microbatches, carry
      )
      loss, aux, gradient, perturbed_loss, grads, perturbation_norm = means
      _, new_state = perturb(gradient)

    if is_active is not None:
      perturbation_norm = jnp.where(is_active, perturbation_norm, 0.0)
    radius_state = _find(ScaleToRadiusState, new_state)
    ema_state = _find(SubtractGradientEmaState, perturbation_state)
    gradient_norm = global_norm(gradient)
    info = SharpnessInfo(
      perturbed_value=perturbed_loss,
      gradient_norm=gradient_norm,
      direction_norm=(
        gradient_norm if radius_state is None else radius_state.direction_norm
      ),
      perturbation_norm=perturbation_norm,
      gradient_ema_cosine=(
        jnp.zeros_like(gradient_norm)
        if ema_state is None
        else _cosine(ema_state.ema, gradient)
      ),
    )
    return loss, new_carry, aux, grads, new_state, info

  return passes


def _mean_over_parts(fn, batch, num_parts, carry):
  """Means of what `fn(part, index, carry)` returns, and the last carry."""
  if num_parts == 1:
    return fn(batch, 0, carry)

  def part_at(index):
    # Row i goes to part i modulo the number of parts, so that a batch whose
    # rows lie on many devices splits without moving a row.
    return jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(
        jnp.reshape(x, (-1, num_parts, *jnp.shape(x)[1:])),
        index,
        axis=1,
        keepdims=False,
      ),
      batch,
    )

  first = jax.eval_shape(part_at, jnp.zeros([], jnp.int32))
  shapes, _ = jax.eval_shape(fn, first, jnp.zeros([], jnp.int32), carry)
  for path, x in jax.tree_util.tree_leaves_with_path(shapes[1]):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      raise TypeError(
        "`loss_fn` must return floating auxiliary outputs when "
        f"`num_microbatches` is above 1, because they are averaged, got "
        f"{x.dtype} at {_name(path)}. Cast it to float32."
      )

  def body(state, index):
    totals, carry = state
    outputs, carry = fn(part_at(index), index, carry)
    totals = jax.tree.map(lambda t, x: t + x.astype(t.dtype), totals, outputs)
    return (totals, carry), None

  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, jnp.result_type(x.dtype, jnp.float32)), shapes
  )
  (totals, carry), _ = jax.lax.scan(
    body, (zeros, carry), jnp.arange(num_parts, dtype=jnp.int32)
  )
  means = jax.tree.map(
    lambda t, x: (t / num_parts).astype(x.dtype), totals, shapes
  )
  return means, carry


def _is_active(step, every, start, stop):
  """Whether the gates let this step ascend, a bool of shape []."""
  if step is None:
    raise ValueError(
      "`perturbation` must count its updates for `every`, `start` and `stop` "
      "to know the step. Build it with `scale_to_radius`."
    )
  is_active = (step >= start) & ((step - start) % every == 0)
  return is_active if stop is None else is_active & (step < stop)


def _perturbation_norm(epsilon, state):
  """Norm of the perturbation, from the state where it has it."""
  radius_state = _find(ScaleToRadiusState, state)
  if radius_state is None:  # Not one of ours: measure.
    return global_norm(epsilon)
  return radius_state.perturbation_norm


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
      # The average is that of the conjugate gradients.
      lambda m, g: jnp.sum(jnp.real(widen(m) * widen(g))),
      ema,
      gradient,
    )
  )
  norms = global_norm(ema) * global_norm(gradient)
  return jnp.where(norms > 0, inner / jnp.where(norms > 0, norms, 1.0), 0.0)


def check_loss_fn(loss_fn):
  """Raises unless `loss_fn` is callable."""
  if not callable(loss_fn):
    raise TypeError(
      "`loss_fn` must be callable, a function that returns the loss, got "
      f"{loss_fn!r}."
    )


def _check_loss(loss):
  if hasattr(loss, "dtype") or isinstance(loss, (int, float, complex)):
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if not shape and jnp.issubdtype(dtype, jnp.floating):
      return
    got = f"{dtype}{list(shape)}"
  else:
    got = type(loss).__name__
  raise TypeError(
    f"`loss_fn` must return the loss as a real scalar, got {got}. Take the "
    "mean over the batch; return other outputs as aux, with `has_aux=True`."
  )


def _check_state(perturbation, state, params):
  """Raises unless `state` is one that `perturbation` made for `params`."""
  expected = jax.eval_shape(perturbation.init, params)
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  same = jax.tree.structure(state) == jax.tree.structure(expected)
  if not same or shapes(state) != shapes(expected):
    raise ValueError(
      "`perturbation_state` must be that of `perturbation.init(params)`, with "
      f"shapes {shapes(expected)}, got {shapes(state)}."
    )


def _check_params(params):
  if not (leaves := jax.tree_util.tree_leaves_with_path(params)):
    raise ValueError("`params` must hold at least one array, got none.")
  for path, x in leaves:
    dtype = getattr(x, "dtype", None) or jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        f"`params` must hold floating-point arrays, got {dtype} at "
        f"{_name(path)}. Close over it, or keep it in the model state."
      )


def _check_batch(batch, num_microbatches):
  """Raises for an empty batch, or one that does not split evenly."""
  lengths = {
    _name(path): jnp.shape(x)[0] if jnp.ndim(x) else None
    for path, x in jax.tree_util.tree_leaves_with_path(batch)
  }
  if empty := [name for name, length in lengths.items() if length == 0]:
    raise ValueError(
      f"`batch` must not be empty, got no rows at {', '.join(empty)}."
    )
  if num_microbatches == 1:
    return
  if None in lengths.values() or len(set(lengths.values())) != 1:
    raise ValueError(
      "`batch` must hold arrays of one number of rows to be split into "
      f"micro-batches, got {lengths}. Close over what is not per row."
    )
  (length,) = set(lengths.values())
  if length % num_microbatches:
    raise ValueError(
      f"`num_microbatches` must divide the number of rows of the batch, got "
      f"{num_microbatches} for {length} rows, {length % num_microbatches} too "
      "many."
    )


def _name(path):
  return jax.tree_util.keystr(path) or "the root"

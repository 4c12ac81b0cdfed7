"""The optax interface: F-SAM as a link of `optax.chain`.

It takes the second gradient. The gradient EMA is in `_perturbation`.
"""

from typing import Any, Callable, Optional, Union

import jax
from jax import core
from jax import numpy as jnp
import optax
import optax.tree

from fsam_optax._perturbation import Average
from fsam_optax._perturbation import Mask
from fsam_optax._perturbation import Order
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbation import friendly_perturbation
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import is_overwritten
from fsam_optax._perturbation import widen

AxisName = Union[str, tuple[str, ...]]


def sharpness_aware(
  perturbation: optax.GradientTransformation,
  *,
  axis_name: Optional[AxisName] = None,
  checked: bool = False,
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
    axis_name: axis of :func:`jax.pmap`, :func:`jax.shard_map` or
      :func:`jax.vmap`, or a tuple of axes, over which both gradients are
      averaged. None under :func:`jax.jit` alone, and where ``grad_fn`` averages
      already, because the loss takes its mean over the axis.
    checked: whether each update takes a third gradient, ``grad_fn(params)``,
      and raises an error unless it equals ``updates``: for the first steps of a
      new loop. A compiled update prints the error and returns NaN.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs`. Its ``update(updates,
    state, params, *, grad_fn, **extra_args)`` takes the gradient at ``params``
    as ``updates`` and calls ``grad_fn`` once, or twice with ``checked``. The
    extra argument ``optimizer_state`` goes to ``perturbation``. The state is
    that of ``perturbation``. Gradients of complex parameters are those of
    :func:`jax.grad`; the ascent is along their conjugate.

  Raises:
    TypeError: if ``perturbation`` is not a gradient transformation, or needs
      ``grad_fn`` itself, or ``axis_name`` is no name; at update, if ``grad_fn``
      is not callable.
    ValueError: if ``axis_name`` is empty or repeats a name; at update, if
      ``params`` or ``grad_fn`` is missing, a wrapper such as
      :func:`optax.masked` has cut leaves out of ``params``, a gradient has
      another structure or other shapes than ``params``, another dtype than
      ``updates`` or still differs between replicas, ``axis_name`` is not bound,
      or :func:`jax.shard_map` has summed over it already; with ``checked``,
      uncompiled, if ``updates`` is not ``grad_fn(params)``.

  .. note::
    ``grad_fn`` takes the parameters alone and returns their gradient on the
    same batch, with the same dropout key and the same batch statistics. It does
    all that the first gradient went through: the mean over replicas, the
    division by a loss scale, casts.
  """

  check_perturbation(perturbation)
  perturbation = optax.with_extra_args_support(perturbation)
  axes = axes_of("axis_name", axis_name)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    grad_fn: Optional[Callable[[optax.Params], optax.Updates]] = None,
    optimizer_state: Optional[optax.OptState] = None,
    **extra_args,
  ):
    del extra_args  # For other links of the chain.
    if params is None:
      raise ValueError(
        "`params` must be given, got None. Call `update(grads, state, params, "
        "grad_fn=grad_fn)`."
      )
    _check_complete(params)
    if grad_fn is None:
      raise ValueError(
        "`grad_fn` must be given, got None. Call `update(grads, state, params, "
        "grad_fn=lambda p: jax.grad(loss)(p, batch))`. Flax's train state does "
        "not pass it on: use `fsam_optax.TrainState`. In NNX "
        "`fsam_optax.nnx.value_and_grad` returns it. A train step that takes "
        "both gradients gets `friendly_perturbation`, not `fsam` in its chain."
      )
    if not callable(grad_fn):
      raise TypeError(
        "`grad_fn` must be callable, a function of the parameters that returns "
        f"their gradient, got {type(grad_fn).__name__}."
      )
    _check_shapes(updates, params)
    gradient = _averaged(grad_fn, axes)
    if axes:
      updates = _mean(updates, axes)
    epsilon, state = perturbation.update(
      ascent_gradient(updates), state, params, optimizer_state=optimizer_state
    )
    perturbed_updates = gradient(optax.apply_updates(params, epsilon))
    _check_like(perturbed_updates, updates)
    if checked:
      clean = gradient(params)
      _check_like(clean, updates)
      perturbed_updates = right_or_nan(
        perturbed_updates, is_close(updates, clean), _NO_GRADIENT
      )
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
  average: Average = "own",
  axis_name: Optional[AxisName] = None,
  checked: bool = False,
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
  :math:`\sigma` is ``sigma``, :math:`\lambda` is ``lmbda``, and the next link
  of the chain, the base optimizer, gets :math:`u_t`.

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
    eta: added to the absolute weights when adaptive.
    average: ``"own"``, or ``"optimizer"`` for the momentum of the base
      optimizer, see :func:`friendly_perturbation`. The update then needs the
      state of the whole chain: ``update(grads, opt_state, params,
      grad_fn=grad_fn, optimizer_state=opt_state)``.
    axis_name: axis, or axes, over which both gradients are averaged.
    checked: whether to compare ``updates`` with ``grad_fn(params)``.

  Returns:
    A :class:`optax.GradientTransformationExtraArgs`, see
    :func:`sharpness_aware` for ``axis_name``, ``checked`` and the ``grad_fn``
    that its update needs.

  Raises:
    TypeError: if a hyperparameter is neither a real scalar nor callable.
    ValueError: if a hyperparameter is out of its range; at update, see
      :func:`sharpness_aware`.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024

  .. warning::
    A link before ``fsam`` changes the direction of the ascent alone: the
    gradient that comes out is ``grad_fn``'s. :class:`optax.MultiSteps` goes
    around the base optimizer, ``chain(fsam(), MultiSteps(...))``. Frozen
    parameters are perturbed and take a part of the radius, unless ``mask``
    excludes them.
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
      average=average,
    ),
    axis_name=axis_name,
    checked=checked,
  )


def axes_of(name: str, value: Optional[AxisName]) -> tuple[str, ...]:
  """The axis names in the argument called `name`, as a tuple."""
  axes = (value,) if isinstance(value, str) else value
  if axes is None:
    return ()
  if not isinstance(axes, tuple) or not all(isinstance(a, str) for a in axes):
    raise TypeError(
      f"`{name}` must be the name of an axis or a tuple of names, got "
      f"{value!r}."
    )
  if not axes or len(set(axes)) < len(axes):
    raise ValueError(
      f"`{name}` must name at least one axis, and each once, got {value!r}."
    )
  return axes


def _averaged(grad_fn, axes):
  def gradient_at(params):
    try:
      gradient = grad_fn(params)
    except Exception as error:
      if isinstance(params, jax.Array) and params.ndim == 1:
        error.add_note(
          f"`fsam` gave `grad_fn` a vector of {params.size} entries. If "
          "`optax.flatten` made it, put that behind `fsam`: `chain(fsam(), "
          "flatten(base))`."
        )
      raise
    return _mean(gradient, axes, is_own=True) if axes else gradient

  return gradient_at


def _mean(
  gradient: optax.Updates, axes: tuple[str, ...], is_own: bool = False
) -> optax.Updates:
  """The mean over replicas; with `is_own` it has to be each replica's own."""
  check_bound(axes)
  # The axes whose arrays JAX types as varying: the index of one is.
  tracked = [a for a in axes if _varying_axes(jax.lax.axis_index(a))]

  def mean_of(path, g):
    same = [a for a in tracked if a not in _varying_axes(g)]
    if is_own and same:
      raise ValueError(
        "`grad_fn` must return each replica's own gradient where `fsam` has an "
        f"`axis_name`, got one that is the same along {same} at "
        f"{jax.tree_util.keystr(path) or 'the root'}: by its default check "
        "jax.shard_map sums it over the replicas. Leave `axis_name` out and "
        "take the mean inside the loss, by jax.lax.pmean; or give shard_map "
        "`check_vma=False`."
      )
    if is_overwritten(path):
      own = tuple(a for a in axes if a not in same)
      return jax.lax.pmax(g, own) if own else g
    return jax.lax.pmean(g, axes)

  return jax.tree_util.tree_map_with_path(mean_of, gradient)


def check_bound(axes: tuple[str, ...]):
  """Raises unless an enclosing pmap, shard_map or vmap names every axis."""
  for axis in axes:
    try:
      jax.lax.axis_size(axis)
    except NameError as error:
      raise ValueError(
        "`axis_name` must be an axis of the jax.pmap, jax.shard_map or "
        f"jax.vmap around the step, got {axis!r}, which none of them names. "
        "Wrap the step, by jax.pmap, `sharding.shard_map_step` or "
        "`sharding.group_step`. Under jax.jit alone leave `axis_name` out: the "
        "arrays' shardings say what is averaged there."
      ) from error


_NO_GRADIENT = (
  "`updates` must be the gradient, `grad_fn(params)`, got another. Put `fsam` "
  "first in its chain; scale and average the gradient inside `grad_fn`, and "
  "give it the rows and the dropout key of the first pass."
)


def is_close(tree: Any, other: Any) -> jax.Array:
  """Whether the floating arrays of two trees agree, but for rounding.

  Arrays that are not finite count as equal.
  """
  pairs = [
    (jnp.asarray(x), jnp.asarray(y))
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
  ]
  # A narrow dtype rounds more.
  eps = max((float(jnp.finfo(x.dtype).eps) for x, _ in pairs), default=0.0)
  difference = global_norm([widen(x) - widen(y) for x, y in pairs])
  allowed = max(1e-3, 8 * eps) * global_norm([y for _, y in pairs])
  return ~(difference > allowed)


def right_or_nan(
  tree: Any, is_right: jax.typing.ArrayLike, message: str
) -> Any:
  """The tree where `is_right`, a bool of shape ``[]``, holds; else an error.

  A compiled program prints the message and returns NaN in floating arrays. It
  raises no error, because one device would raise it and the others would wait.
  """
  if not isinstance(is_right, core.Tracer):
    if not is_right:
      raise ValueError(message)
    return tree
  jax.debug.callback(
    lambda is_right: None if is_right else print(message), is_right
  )
  return jax.tree.map(
    lambda x: (
      jnp.where(is_right, x, jnp.full_like(x, jnp.nan))
      if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
      else x
    ),
    tree,
  )


def _check_shapes(updates: optax.Updates, params: optax.Params):
  """Raises unless the gradient has the structure and shapes of `params`."""
  if differing := difference(params, updates, dtypes=False, containers=True):
    raise ValueError(
      "`updates` must have the structure and shapes of `params`, with "
      f"{differing}. Give the arrays that are differentiated as `params`, and "
      "no others; in Equinox `params, static = eqx.partition(model, "
      "eqx.is_inexact_array)`. Take the mean of gradients per row first."
    )


def difference(
  wanted: optax.Params,
  got: optax.Params,
  *,
  dtypes: bool = True,
  containers: bool = False,
) -> Optional[str]:
  """The first difference of two trees, or None where they agree.

  An example is ``"float32[3] at mean/bias, got float32[2]"``. Leaves are
  compared one by one, by the names on their paths. Containers are not compared
  by ``==``, which a user's class may define as it likes; with `containers` the
  structures of both trees must be equal, too.
  """
  leaves = [leaves_by_names(tree) for tree in (wanted, got)]
  for path in [*leaves[0], *leaves[1]]:
    one, other = (shape_and_dtype(x.get(path), dtypes) for x in leaves)
    if one != other:
      return f"{one} at {'/'.join(path) or 'the root'}, got {other}"
  one, other = jax.tree.structure(wanted), jax.tree.structure(got)
  if containers and one != other:
    return f"the structure {one}, got {other}"
  return None


def leaves_by_names(tree: Any) -> dict[tuple[str, ...], Any]:
  """The leaves by the names on their paths, of whatever containers."""
  return {
    tuple(jax.tree_util.keystr((x,), simple=True) for x in path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def shape_and_dtype(x: Any, has_dtype: bool = True) -> str:
  """A leaf as text, such as ``float32[3]``; ``nothing`` for None."""
  if x is None:
    return "nothing"
  if (dtype := dtype_of(x)) is None:
    return type(x).__name__
  return f"{dtype if has_dtype else 'shape '}{list(jnp.shape(x))}"


def dtype_of(x: Any) -> Any:
  """The dtype of an array or a Python number; None for anything else."""
  is_number = isinstance(x, (bool, int, float, complex))
  return jnp.result_type(x) if is_number or hasattr(x, "dtype") else None


def _check_complete(params: optax.Params):
  """Raises where a wrapper has cut leaves out of `params`."""
  is_masked = lambda x: isinstance(x, optax.MaskedNode)
  if any(map(is_masked, jax.tree.leaves(params, is_leaf=is_masked))):
    raise ValueError(
      "`params` must hold every parameter of the model, got masked nodes: "
      "`grad_fn` needs all of them. Put `fsam(mask=trained)` first, a mask "
      "with True for each leaf that is trained, and wrap the other links: "
      "`chain(fsam(mask=trained), partition(...))`. Or use "
      "`fsam_optax.value_and_grad` with the same mask, and any wrapper."
    )


def _check_like(updates: optax.Updates, reference: optax.Updates):
  """Raises unless both trees agree in structure, shapes and dtypes."""
  if differing := difference(reference, updates, containers=True):
    raise ValueError(
      "`grad_fn` must return gradients of the structure, shapes and dtypes of "
      f"`updates`, with {differing}. Take both gradients with the same "
      "function. With `has_aux` or `value_and_grad`, return the gradient alone."
    )
  for g, r in zip(
    jax.tree.leaves(updates), jax.tree.leaves(reference), strict=True
  ):
    if left := _varying_axes(g) - _varying_axes(r):
      raise ValueError(
        "`grad_fn` must return the mean gradient of all replicas, as `updates` "
        f"is, got one that differs along {sorted(left)}. Give `fsam` the "
        "`axis_name`, or take the mean inside `grad_fn`."
      )


def _varying_axes(x: Any) -> frozenset:
  """The axes of an enclosing shard_map along which an array varies."""
  # Both names are private to JAX. Where both are missing, no axis is found.
  array_type = jax.typeof(x)
  until_0_9 = getattr(array_type, "vma", frozenset())  # JAX up to 0.9.
  since_0_10 = getattr(array_type, "manual_axis_type", None)
  return getattr(since_0_10, "varying", until_0_9)

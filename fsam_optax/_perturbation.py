"""The ascent: the gradient EMA, and the perturbation of the weights from it.

These are plain optax gradient transformations. They need no loss and no second
gradient, so they compose with everything in optax.
"""

import inspect
import math
from typing import Any, Callable, Literal, NamedTuple, Optional, Union

import jax
from jax import core
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

Average = Literal["own", "optimizer"]
Order = Literal["official", "paper"]
Mask = Optional[Union[Any, Callable[[optax.Params], Any]]]


class SubtractGradientEmaState(NamedTuple):
  """State of :func:`subtract_gradient_ema`.

  Attributes:
    count: number of gradients the average has taken in, shape ``[]``, int32.
    ema: the moving average of the gradients, same tree and shapes as the
      parameters, dtype of the parameters or ``accumulator_dtype``. None where
      the optimizer's momentum is the average.
  """

  count: jax.typing.ArrayLike
  ema: optax.Updates


class ScaleToRadiusState(NamedTuple):
  """State of :func:`scale_to_radius`.

  The two norms are those of the last update. The scaling computes them in any
  case, and the state keeps them for logging.

  Attributes:
    count: number of updates so far, shape ``[]``, int32.
    direction_norm: the norm that the radius was divided by, shape ``[]``,
      float32 (float64 for float64 parameters). Not finite where the direction
      was not.
    perturbation_norm: Euclidean norm of the perturbation, shape ``[]``, same
      dtype.
  """

  count: jax.typing.ArrayLike
  direction_norm: jax.Array
  perturbation_norm: jax.Array


def subtract_gradient_ema(
  sigma: optax.ScalarOrSchedule = 1.0,
  lmbda: optax.ScalarOrSchedule = 0.9,
  *,
  order: Order = "official",
  accumulator_dtype: Optional[jax.typing.DTypeLike] = None,
) -> optax.GradientTransformation:
  r"""Subtracts a moving average of past gradients from the gradient.

  What is left of the mini-batch gradient :math:`g_t` is mostly the noise of the
  batch. In the order of the authors' code,

  .. math::

    \begin{align*}
      d_t &= g_t - \sigma m_{t-1}, \\
      m_t &= \lambda m_{t-1} + (1 - \lambda) g_t,
    \end{align*}

  with :math:`d_0 = g_0` and :math:`m_0 = g_0`; :math:`\sigma` is ``sigma`` and
  :math:`\lambda` is ``lmbda``. In the order of the paper the average starts at
  zero and takes in the gradient before it is subtracted,

  .. math::

    \begin{align*}
      m_t &= \lambda m_{t-1} + (1 - \lambda) g_t, \\
      d_t &= g_t - \sigma m_t.
    \end{align*}

  At :math:`\sigma = 1` both point the same way, because
  :math:`g_t - m_t = \lambda (g_t - m_{t-1})`.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp
    >>> tx = fsam_optax.subtract_gradient_ema(sigma=1.0, lmbda=0.5)
    >>> state = tx.init(jnp.zeros(2))
    >>> _, state = tx.update(jnp.array([2.0, 4.0]), state)
    >>> direction, state = tx.update(jnp.array([3.0, 3.0]), state)
    >>> print(direction, state.ema)
    [ 1. -1.] [2.5 3.5]

  Args:
    sigma: fraction of the average that is subtracted; finite and non-negative,
      a scalar or a schedule of the number of gradients taken in.
    lmbda: decay of the average, in ``[0, 1]``, a scalar or a schedule.
    order: ``"official"`` subtracts the average of the gradients before this
      one, ``"paper"`` the average that includes it.
    accumulator_dtype: floating dtype of the average, of 16 bits at least;
      ``None`` for that of the parameters. The average of complex parameters is
      complex, in complex64 at least.

  Returns:
    A :class:`optax.GradientTransformation` whose updates are :math:`d_t`, in
    the tree, shapes and dtypes of the gradient.

  Raises:
    TypeError: if ``sigma`` or ``lmbda`` is neither a real scalar nor callable.
    ValueError: if one of them is out of its range, ``order`` is unknown, or
      ``accumulator_dtype`` cannot hold an average.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024

  .. note::
    A gradient by which the norm of :math:`d_t` is not finite does not enter the
    average: the state, with its count, stays as it was.

  .. warning::
    A widely used PyTorch port averages the already subtracted gradients
    instead of :math:`g_t`. At :math:`\sigma = 1` that removes only half of the
    full gradient.
  """
  _check_average(sigma, lmbda, order)
  if isinstance(accumulator_dtype, jax.Array):  # As if it was a schedule.
    raise ValueError(
      "`accumulator_dtype` must be a dtype, got an array. Under "
      "`optax.inject_hyperparams` name it in "
      "`static_args=('accumulator_dtype',)`."
    )
  # An average of integers stays at zero, which is SAM. One of 8 bits stays
  # where it is, because a step moves it by less than half of its last bit.
  if accumulator_dtype is not None and (
    not jnp.issubdtype(accumulator_dtype, jnp.floating)
    or jnp.finfo(accumulator_dtype).bits < 16
  ):
    raise ValueError(
      "`accumulator_dtype` must be a floating dtype of 16 bits or more, got "
      f"{jnp.dtype(accumulator_dtype).name}. Take 'bfloat16', or None for the "
      "dtype of the parameters."
    )

  def zeros(x):
    # With an explicit dtype, because an average of a weak type would compile
    # the second step again.
    dtype = accumulator_dtype or jnp.result_type(x)
    if jnp.issubdtype(jnp.result_type(x), jnp.complexfloating):
      dtype = wide_dtype(dtype, jnp.complex64)
    return jnp.zeros_like(x, dtype=dtype)

  def init_fn(params):
    return SubtractGradientEmaState(
      count=jnp.zeros([], jnp.int32), ema=jax.tree.map(zeros, params)
    )

  def update_fn(updates, state, params=None, *, is_finite=None, **extra_args):
    del params, extra_args
    decay = _value_at("lmbda", lmbda, state.count, upper=1.0)
    fraction = _value_at("sigma", sigma, state.count)
    if order == "official":
      # The first update sets the average to g_0. Before that it is zero, so
      # that the subtraction needs no special first step.
      decay = jnp.where(state.count == 0, 0.0, decay)
    is_plain = isinstance(sigma, (int, float)) and sigma == 1
    direction, ema = _direction_and_next_ema(
      updates, state.ema, fraction, decay, order, is_plain
    )
    direction = optax.tree.cast_like(direction, updates)
    # The average is finite, so the direction is finite where g is. Compiled,
    # its norm and that of `scale_to_radius` are one computation.
    is_finite, count = _counted(direction, state.count, is_finite)
    return direction, SubtractGradientEmaState(
      count=count,
      ema=jax.tree.map(
        lambda new, old: jnp.where(is_finite, _cast_like(new, old), old),
        ema,
        state.ema,
      ),
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_average(sigma, lmbda, order):
  check_hyperparameter("sigma", sigma)
  check_hyperparameter("lmbda", lmbda, upper=1.0)
  if order not in ("official", "paper"):
    raise ValueError(
      f"`order` must be 'official' or 'paper', got {order!r}. 'official' is "
      "what the authors' code does."
    )


def _counted(direction, count, is_finite):
  """Whether the direction is finite; the count, one more if it is."""
  if is_finite is None:
    is_finite = jnp.isfinite(global_norm(direction))
  return is_finite, jnp.where(is_finite, optax.safe_increment(count), count)


def _direction_and_next_ema(gradient, ema, fraction, decay, order, is_plain):
  """The direction in either order and the next average, in float32 at least.

  Both orders average by m_t = m_{t-1} + (1 - lambda) (g_t - m_{t-1}). The
  compiled step keeps one tree beside the average, d_t or g_t - m_{t-1}. The
  other follows from it, so that the memory of g_t is free.
  """
  if order == "official":
    direction = _tree_map_wide(lambda g, m: g - fraction * m, gradient, ema)
    difference = direction
    if not is_plain:  # From d_t = g_t - sigma m_{t-1}.
      difference = _tree_map_wide(
        lambda d, m: d + (fraction - 1) * m, direction, ema
      )
  else:
    difference = _tree_map_wide(lambda g, m: g - m, gradient, ema)
  average = _tree_map_wide(lambda x, m: m + (1 - decay) * x, difference, ema)
  if order == "paper" and is_plain:
    # g_t - m_t = lambda (g_t - m_{t-1}).
    direction = jax.tree.map(lambda x: decay * x, difference)
  elif order == "paper":
    direction = _tree_map_wide(lambda g, m: g - fraction * m, gradient, average)
  return direction, average


def _subtract_optimizer_momentum(
  sigma: optax.ScalarOrSchedule, lmbda: Any, order: Order
) -> optax.GradientTransformationExtraArgs:
  """Subtracts the average of second gradients that an optimizer keeps.

  The update has three more arguments. ``optimizer_state`` is the optimizer's
  state before its own update. ``optimizer_steps`` is the number of updates in
  it; it is used where that state has no count, and None stands for the number
  of updates of this transformation. ``averages`` is a list to which the average
  is appended.
  """
  _check_average(sigma, lmbda, order)
  is_value = not isinstance(lmbda, core.Tracer)
  if is_value and (_is_schedule(lmbda) or float(lmbda) == 1):
    raise ValueError(
      "`lmbda` must be the decay of the optimizer's momentum with "
      f"average='optimizer', a number below 1, got {lmbda!r}."
    )

  no_average: Any = None

  def init_fn(params):
    del params
    return SubtractGradientEmaState(jnp.zeros([], jnp.int32), no_average)

  def update_fn(
    updates,
    state,
    params=None,
    *,
    optimizer_state=None,
    optimizer_steps=None,
    averages=None,
    is_finite=None,
    **extra_args,
  ):
    del params, extra_args
    steps = state.count if optimizer_steps is None else optimizer_steps
    average = _optimizer_average(updates, optimizer_state, steps, lmbda)
    if averages is not None:
      averages.append(average)
    if order == "paper":
      average = _tree_map_wide(
        lambda g, m: lmbda * m + (1 - lmbda) * g, updates, average
      )
    fraction = _value_at("sigma", sigma, state.count)
    direction = _tree_map_wide(lambda g, m: g - fraction * m, updates, average)
    direction = optax.tree.cast_like(direction, updates)
    _, count = _counted(direction, state.count, is_finite)
    return direction, SubtractGradientEmaState(count, no_average)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Momentum(NamedTuple):
  """The momentum of one parameter."""

  value: jax.Array
  is_sum: bool  # A sum of decayed gradients, as in SGD; else their average.
  count: Optional[jax.Array]  # Number of updates; None if the state has none.
  source: str  # The type of its state.


def _optimizer_average(gradient, optimizer_state, steps, lmbda):
  """The average in the momentum, in the tree of the gradient, in float32.

  With the gradients u_t, SGD's momentum is v_t = lambda v_{t-1} + u_t, and
  Adam's is v_t = lambda v_{t-1} + (1 - lambda) u_t. Both start at zero, so the
  weights of the gradients sum to (1 - lambda^t) / (1 - lambda) and to
  1 - lambda^t. Each momentum divided by its sum of weights is the average m_t.
  """
  if optimizer_state is None:
    raise ValueError(
      "`optimizer_state` must be given with average='optimizer', the "
      "optimizer's state before its update, got None. Call `fn(params, "
      "perturbation_state, batch, optimizer_state=opt_state)`, or in a chain "
      "`tx.update(grads, opt_state, params, grad_fn=grad_fn, "
      "optimizer_state=opt_state)`."
    )
  momenta = momenta_by_path(optimizer_state)

  def average_of(path, g):
    name = jax.tree_util.keystr(path)
    # Beside a collection for fp8, Flax gives the optimizer "params" alone.
    momentum = momenta.get(name, momenta.get(name.removeprefix("['params']")))
    if momentum is None or jnp.shape(momentum.value) != jnp.shape(g):
      shape = "none" if momentum is None else list(jnp.shape(momentum.value))
      raise ValueError(
        "`optimizer_state` must hold the momentum of each perturbed parameter "
        f"with average='optimizer', of shape {list(jnp.shape(g))} at "
        f"{name or 'the root'}, got {shape} in "
        f"{', '.join(_state_names(optimizer_state))}. Take an optimizer that "
        "keeps one, such as optax.sgd(learning_rate, momentum=0.9) or "
        "optax.adamw(learning_rate); exclude the parameters that it does not "
        "train by `mask`; or take average='own'."
      )
    count = steps if momentum.count is None else momentum.count
    decay = jnp.asarray(lmbda, jnp.finfo(wide_dtype(momentum.value)).dtype)
    weights = 1 - decay ** jnp.asarray(count, decay.dtype)
    if momentum.is_sum:
      weights = weights / (1 - decay)
    # Before the first update there is no average.
    scale = jnp.where(count > 0, 1 / jnp.where(count > 0, weights, 1.0), 0.0)
    return scale * widen(momentum.value)

  # The optimizer's gradients are conjugates already, where they are complex.
  return jax.tree_util.tree_map_with_path(average_of, gradient)


def momenta_by_path(optimizer_state: optax.OptState) -> dict[str, _Momentum]:
  """The momenta in an optimizer's state, by the path of their parameter."""
  momenta = {}
  names = _state_names(optimizer_state)
  # With these in the chain the momentum averages scaled gradients.
  scaled = [name for name in names if name in _PRECONDITIONERS]

  def collect(state, count):
    for x in jax.tree.leaves(state, is_leaf=_is_state):
      if isinstance(x, optax.MultiStepsState):
        collect(x.inner_opt_state, x.gradient_step)
        continue
      if not _is_state(x) or type(x).__name__ == "ScaleByNovogradState":
        continue
      is_sum, source = hasattr(x, "trace"), type(x).__name__
      if is_sum and scaled:
        raise ValueError(
          "`optimizer_state` must hold a momentum of the gradients themselves "
          f"with average='optimizer', got one behind {scaled[0]}, which "
          "scales them. Take average='own'."
        )
      tree = x.trace if is_sum else x.mu
      for path, value in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path)
        if name in momenta:
          raise ValueError(
            "`optimizer_state` must hold one momentum of each parameter with "
            f"average='optimizer', got those of {momenta[name].source} and "
            f"{source} at {name or 'the root'}. Give the part of the state "
            "that holds the right one, or take average='own'."
          )
        own_count = x.count if "count" in x._fields else count
        momenta[name] = _Momentum(value, is_sum, own_count, source)

  collect(optimizer_state, None)
  return momenta


_PRECONDITIONERS = frozenset({"ScaleByRmsState", "ScaleByRmsWithCountState"})


def _is_state(x: object) -> bool:
  """Whether this state has a momentum, or is that of `optax.MultiSteps`."""
  fields = getattr(x, "_fields", ())
  return isinstance(x, optax.MultiStepsState) or bool(
    {"trace", "mu"} & set(fields)
  )


def _state_names(state: optax.OptState) -> list[str]:
  """The names of the types of the states inside a nested one."""
  names = {}

  def add(x):
    if hasattr(x, "_fields") and type(x) not in (
      optax.EmptyState,
      optax.MaskedNode,
    ):
      names[type(x).__name__] = None
    return False

  jax.tree.leaves(state, is_leaf=add)
  return list(names) or ["a state without arrays"]


def scale_to_radius(
  rho: optax.ScalarOrSchedule,
  *,
  adaptive: bool = False,
  eps: float = 1e-12,
  eta: float = 0.0,
) -> optax.GradientTransformation:
  r"""Scales a direction to a perturbation of radius ``rho``.

  .. math::

    \epsilon = \rho \frac{d}{\lVert d \rVert + \text{eps}}
    \qquad\text{or, adaptive,}\qquad
    \epsilon = \rho \frac{T^2 d}{\lVert T d \rVert + \text{eps}}, \quad
    T = |w| + \eta

  with one global norm over all leaves, taken in float32 at least.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp
    >>> tx = fsam_optax.scale_to_radius(rho=0.5)
    >>> direction = jnp.array([3.0, 4.0])
    >>> perturbation, state = tx.update(direction, tx.init(direction))
    >>> print(perturbation, state.direction_norm)
    [0.3 0.4] 5.0

  Args:
    rho: radius, finite and non-negative, in the units of the parameters (when
      adaptive, relative to them); a scalar or a schedule.
    adaptive: whether to measure the radius in the metric of ASAM, which moves
      each weight in proportion to its size. Needs ``params``.
    eps: added to the norm, as the authors' code does.
    eta: added to the absolute weights when adaptive: 0 as in the authors' code,
      0.01 in the ASAM paper, so that weights at zero can move.

  Returns:
    A :class:`optax.GradientTransformation` whose updates are the perturbation,
    in the dtypes of ``params`` (of the direction where ``params`` is None).
    A zero direction, or one whose norm is not finite, gives no perturbation.

  Raises:
    TypeError: if ``rho``, ``eps`` or ``eta`` is neither a real scalar nor
      (``rho``) callable.
    ValueError: if one of them is negative or not finite; at update, if
      ``adaptive`` and ``params`` is missing.

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks
    <https://arxiv.org/abs/2102.11600>`_, 2021
  """
  check_hyperparameter("rho", rho)
  check_hyperparameter("eps", eps, can_vary=False)
  check_hyperparameter("eta", eta, can_vary=False)

  def init_fn(params):
    # The norm of complex parameters is real.
    dtype = jnp.finfo(wide_dtype(*jax.tree.leaves(params))).dtype
    return ScaleToRadiusState(
      count=jnp.zeros([], jnp.int32),
      direction_norm=jnp.zeros([], dtype),
      perturbation_norm=jnp.zeros([], dtype),
    )

  def update_fn(updates, state, params=None):
    if adaptive:
      if params is None:
        raise ValueError(
          "`params` must be given when `adaptive=True`, got None. Call "
          "`update(updates, state, params)`."
        )
      metric = lambda w: jnp.abs(w) + eta
      norm = global_norm(
        _tree_map_wide(lambda d, w: metric(w) * d, updates, params)
      )
      # From the direction, not from its product with the metric above: a GPU
      # then moves weights and average in one pass, with half a tree less.
      updates = _tree_map_wide(
        lambda d, w: jnp.square(metric(w)) * d, updates, params
      )
    else:
      norm = global_norm(updates)
    radius = _value_at("rho", rho, state.count)
    is_finite = jnp.isfinite(norm)
    # Selected, not multiplied: zero times NaN is NaN. Selected before the
    # division, so that the derivative of a skipped step is finite, too. The
    # zero is negative, because a weight of -0.0 plus 0.0 would be 0.0.
    is_usable = is_finite & (norm > 0)
    scale = jnp.where(
      is_usable, radius / (jnp.where(is_usable, norm, 1.0) + eps), 0.0
    )
    perturbation = jax.tree.map(
      lambda d, like: jnp.where(is_finite, scale * widen(d), -0.0).astype(
        jnp.result_type(like)
      ),
      updates,
      updates if params is None else params,
    )
    # ||scale * d|| = scale * ||d||: no pass over the perturbation.
    length = global_norm(updates) if adaptive else norm
    perturbation_norm = scale * jnp.where(is_finite, length, 0.0)
    return perturbation, ScaleToRadiusState(
      count=optax.safe_increment(state.count),
      direction_norm=norm.astype(state.direction_norm.dtype),
      perturbation_norm=perturbation_norm.astype(state.perturbation_norm.dtype),
    )

  return optax.GradientTransformation(init_fn, update_fn)


def friendly_perturbation(
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
) -> optax.GradientTransformation:
  r"""The perturbation of F-SAM: along the gradient minus its average.

  .. math::

    \epsilon_t = \rho \frac{d_t}{\lVert d_t \rVert + 10^{-12}}, \qquad
    d_t = g_t - \sigma m_{t-1}

  A chain of :func:`subtract_gradient_ema` (:math:`\sigma` is ``sigma``, the
  decay of :math:`m` is ``lmbda``) and :func:`scale_to_radius` (:math:`\rho` is
  ``rho``). At ``sigma=0`` it is the perturbation of SAM.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp
    >>> perturbation = fsam_optax.friendly_perturbation(rho=0.1)
    >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> state = perturbation.init(params)
    >>> updates, state = perturbation.update(grads, state, params)
    >>> print(updates)
    [0.06 0.08]

  Args:
    rho: radius, finite and non-negative. The paper uses 0.05 to 0.2.
    sigma: fraction of the average that is subtracted, finite and non-negative.
    lmbda: decay of the average, in ``[0, 1]``. The paper uses 0.6, 0.9, 0.95.
    adaptive: whether to measure the radius in the metric of ASAM.
    mask: a tree of bools with the structure of the parameters (or a prefix of
      it), or a callable from parameters to such a tree. Leaves at False are
      not perturbed, do not count in the norm, and have no average. None selects
      all. Flax's fp8 collection ``_overwrite_with_gradient`` is never selected:
      it holds no weights, and its gradient is its next value.
    order: ``"official"`` or ``"paper"``, see :func:`subtract_gradient_ema`.
    accumulator_dtype: dtype of the average; ``None`` for that of the
      parameters.
    eta: added to the absolute weights when adaptive, see
      :func:`scale_to_radius`.
    average: ``"own"`` keeps an average, which has the size of the parameters.
      ``"optimizer"`` keeps none. It takes the momentum of the base optimizer
      (of :func:`optax.sgd`, or the first moment of Adam), which averages the
      gradients at the perturbed weights. ``lmbda`` then is the decay of that
      momentum, and the update takes the optimizer's state as
      ``optimizer_state``.

  Returns:
    A :class:`optax.GradientTransformation` from gradients to the perturbation
    of the parameters, in their tree, shapes and dtypes.

  Raises:
    TypeError: if a hyperparameter is neither a real scalar nor callable; at
      init, if ``mask`` holds something else than bools.
    ValueError: if a hyperparameter is out of its range, ``average`` or
      ``order`` is unknown, or ``accumulator_dtype`` is too narrow; at init, if
      ``mask`` does not fit or selects nothing; with ``average="optimizer"`` if
      ``lmbda`` is a schedule or 1, if ``accumulator_dtype`` is given, and at
      update if ``optimizer_state`` does not hold one momentum for each
      perturbed parameter.

  References:
    Li et al., `Friendly Sharpness-Aware Minimization
    <https://arxiv.org/abs/2403.12350>`_, 2024
  """
  if average not in ("own", "optimizer"):
    raise ValueError(
      f"`average` must be 'own' or 'optimizer', got {average!r}. The paper's "
      "is 'own'."
    )
  if average == "own":
    subtract_average = subtract_gradient_ema(
      sigma, lmbda, order=order, accumulator_dtype=accumulator_dtype
    )
  elif accumulator_dtype is not None:
    raise ValueError(
      "`accumulator_dtype` must be None with average='optimizer', got "
      f"{accumulator_dtype!r}. Give the dtype to the optimizer, as "
      "`accumulator_dtype` to optax.sgd or `mu_dtype` to optax.adamw."
    )
  else:
    subtract_average = _subtract_optimizer_momentum(sigma, lmbda, order)
  return _on_selected_leaves(
    optax.chain(
      subtract_average, scale_to_radius(rho, adaptive=adaptive, eta=eta)
    ),
    mask,
  )


def sam_perturbation(
  rho: optax.ScalarOrSchedule = 0.05,
  *,
  adaptive: bool = False,
  mask: Mask = None,
  eta: float = 0.0,
) -> optax.GradientTransformation:
  r"""The perturbation of SAM (or ASAM): along the gradient.

  .. math::

    \epsilon = \rho \frac{g}{\lVert g \rVert + 10^{-12}}

  Examples:
    >>> import fsam_optax, jax.numpy as jnp
    >>> perturbation = fsam_optax.sam_perturbation(rho=0.1)
    >>> params, grads = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
    >>> updates, _ = perturbation.update(
    ...   grads, perturbation.init(params), params
    ... )
    >>> print(updates)
    [0.06 0.08]

  Args:
    rho: radius :math:`\rho`, finite and non-negative, a scalar or a schedule.
    adaptive: whether to measure the radius in the metric of ASAM.
    mask: which leaves to perturb, see :func:`friendly_perturbation`.
    eta: added to the absolute weights when adaptive.

  Returns:
    A :class:`optax.GradientTransformation` from gradients to the perturbation
    of the parameters, in their tree, shapes and dtypes.

  Raises:
    TypeError: if ``rho`` is neither a real scalar nor callable; of ``mask``,
      see :func:`friendly_perturbation`.
    ValueError: if ``rho`` or ``eta`` is negative or not finite.

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  return _on_selected_leaves(
    scale_to_radius(rho, adaptive=adaptive, eta=eta), mask
  )


# The collection in which Flax keeps the scales of its fp8 matrix products, with
# the maxima that they are computed from. It is differentiated with the
# parameters, and its "gradient" is its next value.
OVERWRITTEN = "_overwrite_with_gradient"


class OfOneRadius(optax.GradientTransformationExtraArgs):
  """A perturbation of which one `scale_to_radius` gives the length."""


def _on_selected_leaves(
  perturbation: optax.GradientTransformation, mask: Mask
) -> optax.GradientTransformation:
  """A perturbation of the selected weights, which is zero for other leaves."""

  def selected(tree):
    tree_of_bools = True if mask is None else mask
    # A tree of bools may be of a callable class, such as a module.
    if callable(tree_of_bools) and not any(
      map(_is_bool, jax.tree.leaves(tree_of_bools))
    ):
      tree_of_bools = tree_of_bools(tree)
    _check_mask(tree_of_bools, tree)
    if _has_overwritten(tree):
      tree_of_bools = map_weights(
        lambda is_selected: is_selected,
        jax.tree.broadcast(tree_of_bools, tree),
        overwritten=lambda _: False,
      )
      _check_selects(tree_of_bools)
    return tree_of_bools

  def excluded(tree):
    return jax.tree.map(lambda is_selected: not is_selected, selected(tree))

  on_selected = optax.chain(
    optax.masked(perturbation, selected),
    # `masked` returns the other leaves unchanged, which are gradients.
    optax.masked(optax.set_to_zero(), excluded),
  )
  if mask is not None:
    return OfOneRadius(*on_selected)
  on_all = optax.with_extra_args_support(perturbation)

  def init_fn(params):
    return (on_selected if _has_overwritten(params) else on_all).init(params)

  def update_fn(updates, state, params=None, **extra_args):
    tx = on_selected if _has_overwritten(updates) else on_all
    return tx.update(updates, state, params, **extra_args)

  return OfOneRadius(init_fn, update_fn)


def is_overwritten(path: jax.tree_util.KeyPath) -> bool:
  """Whether Flax overwrites the leaf at this path with its "gradient"."""
  return any(getattr(key, "key", None) == OVERWRITTEN for key in path)


def ascent_gradient(gradient: optax.Updates) -> optax.Updates:
  """The direction of steepest ascent, from a gradient of :func:`jax.grad`.

  It is the conjugate of the gradient, which matters for complex parameters
  alone. Leaves that Flax overwrites get zero.
  """
  return map_weights(jnp.conj, gradient, overwritten=jnp.zeros_like)


def map_weights(
  fn: Callable[..., jax.typing.ArrayLike],
  *trees: optax.Updates,
  overwritten: Callable[..., jax.typing.ArrayLike] = lambda x, *_: x,
) -> optax.Updates:
  """Maps `fn` over weights, and `overwritten` over what Flax overwrites."""
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: (overwritten if is_overwritten(path) else fn)(
      *leaves
    ),
    *trees,
  )


def _has_overwritten(tree: optax.Params) -> bool:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return any(is_overwritten(path) for path, _ in leaves)


def _check_mask(mask: Any, tree: optax.Params):
  """Raises unless `mask` is a prefix of `tree` that selects something."""
  leaves = jax.tree.leaves(mask)
  if not all(map(_is_bool, leaves)):
    raise TypeError(
      "`mask` must hold bools, or be a callable that returns a tree of bools, "
      f"got {', '.join(sorted({type(leaf).__name__ for leaf in leaves}))}."
    )
  try:
    jax.tree.map(lambda *_: None, mask, tree)
  except ValueError as error:
    raise ValueError(
      "`mask` must have the structure of the parameters, or be a prefix of it, "
      f"got {jax.tree.structure(mask)} for {jax.tree.structure(tree)}."
    ) from error
  _check_selects(mask)


def _is_bool(leaf: object) -> bool:
  return isinstance(leaf, (bool, np.bool_))


def _check_selects(mask: Any):
  if not any(jax.tree.leaves(mask)):
    raise ValueError(
      "`mask` must select at least one leaf, got none at True. Under "
      "`optax.inject_hyperparams` name it in `static_args=('mask',)`; to train "
      "without a perturbation, leave it out."
    )


def check_perturbation(perturbation: object):
  """Raises unless this transforms gradients and needs no `grad_fn`."""
  if not isinstance(perturbation, optax.GradientTransformation):
    raise TypeError(
      "`perturbation` must be an optax.GradientTransformation, such as "
      f"friendly_perturbation(rho=0.05) returns, got {perturbation!r}."
    )
  if "grad_fn" in inspect.signature(perturbation.update).parameters:
    raise TypeError(
      "`perturbation` must make a perturbation from a gradient alone, as "
      "friendly_perturbation(rho=0.05) does, got a transformation that "
      "asks for `grad_fn`, such as fsam. Put that one into the optimizer's "
      "chain."
    )


def check_hyperparameter(
  name: str, value: Any, upper: float = math.inf, can_vary: bool = True
):
  """Raises unless `value` is a schedule, or a scalar: traced, or in range."""
  if can_vary and _is_schedule(value):
    return
  what = "must be a real number" + (
    " or a schedule (a callable of the step count)" if can_vary else ""
  )
  is_number = not isinstance(value, (bool, str, bytes, list, tuple))
  is_traced = isinstance(value, core.Tracer)
  is_number = is_number and (is_traced or not hasattr(value, "__jax_array__"))
  if is_number:
    dtype = value.dtype if hasattr(value, "dtype") else np.asarray(value).dtype
    is_number = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(
      dtype, jnp.integer
    )
  if isinstance(value, optax.GradientTransformation):
    raise TypeError(
      f"`{name}` {what}, got an optimizer. Put it behind this link of a chain, "
      "`optax.chain(fsam(rho=0.05), optimizer)`."
    )
  if not is_number:
    raise TypeError(f"`{name}` {what}, got {value!r}.")
  if np.ndim(value) != 0:
    raise ValueError(
      f"`{name}` {what}, got an array of shape {np.shape(value)}."
    )
  if is_traced:
    return
  value = float(value)  # A comparison of an array would be traced.
  if not math.isfinite(value):
    raise ValueError(f"`{name}` must be finite, got {value}.")
  if not 0 <= value <= upper:
    what = (
      "must be non-negative"
      if upper == math.inf
      else f"must be in [0, {upper:g}]"
    )
    raise ValueError(f"`{name}` {what}, got {value}.")


def _is_schedule(value: object) -> bool:
  # A Variable of NNX is an array that can be called.
  return callable(value) and not hasattr(value, "__jax_array__")


def _value_at(
  name: str, value: optax.ScalarOrSchedule, count: Any, upper: float = math.inf
) -> Any:
  """The hyperparameter at a count, in its range.

  A schedule's value is checked if it is concrete. A traced value cannot be
  checked: it is clipped to the range, and is 0 if it is not finite.
  """
  number: Any = value
  if callable(value):
    number = value(count)
    check_hyperparameter(name, number, upper)
  if isinstance(number, core.Tracer):
    # A clip has half of the derivative at the ends.
    in_range = jnp.where(number < 0, 0.0, number)
    in_range = jnp.where(number > upper, upper, in_range)
    number = jnp.where(jnp.isfinite(number), in_range, 0.0)
    if jnp.finfo(number.dtype).bits < 32:  # Injected, like the parameters.
      number = widen(number)
  return number


def wide_dtype(*leaves: Any) -> Any:
  """The dtype that the leaves promote to, float32 at least."""
  # Also where the user has set JAX's strict promotion.
  with jax.numpy_dtype_promotion("standard"):
    return jnp.result_type(jnp.float32, *leaves)


def _cast_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Casts; a value outside a narrower range becomes its limit, not infinite."""
  if jnp.issubdtype(like.dtype, jnp.floating):
    limit = float(jnp.finfo(like.dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
      x = jnp.clip(x, -limit, limit)
  return x.astype(like.dtype)


def widen(x: jax.typing.ArrayLike) -> jax.Array:
  return jnp.asarray(x, wide_dtype(x))


def _tree_map_wide(
  fn: Callable[..., jax.Array], *trees: optax.Updates
) -> optax.Updates:
  return jax.tree.map(lambda *leaves: fn(*map(widen, leaves)), *trees)


def global_norm(tree: optax.Params) -> jax.Array:
  """The Euclidean norm over all leaves, in float32 at least."""
  sums = [_sum_of_squares(widen(x)) for x in jax.tree.leaves(tree)]
  with jax.numpy_dtype_promotion("standard"):
    total = sum(sums, start=jnp.zeros([], jnp.float32))
  # The derivative of the root at zero would be NaN.
  is_positive = total > 0
  return jnp.where(
    is_positive, jnp.sqrt(jnp.where(is_positive, total, 1.0)), total
  )


def _sum_of_squares(x: jax.Array) -> jax.Array:
  if jnp.ndim(x) < 2:
    return _plain_sum(x)
  return jax.lax.platform_dependent(x, cpu=_sum_by_rows, default=_plain_sum)


def _plain_sum(x: jax.Array) -> jax.Array:
  """One reduction, which a compiler may fuse with the array's own operation."""
  return jnp.sum(_square(x))


def _sum_by_rows(x: jax.Array) -> jax.Array:
  """Row by row, because XLA reduces a large array on a CPU by one thread.

  The selection does not change the value. It keeps XLA from merging the two
  sums, as a barrier would, and XLA can fuse it, which it cannot do with a
  barrier.
  """
  rows = jnp.sum(_square(x), axis=-1)
  # A maximum would have half of the derivative where a row is zero.
  return jnp.sum(jnp.where(rows < 0, 0.0, rows))


def _square(x: jax.Array) -> jax.Array:
  # The absolute value of a complex zero has no derivative.
  if jnp.iscomplexobj(x):
    return jnp.square(x.real) + jnp.square(x.imag)
  return jnp.square(x)

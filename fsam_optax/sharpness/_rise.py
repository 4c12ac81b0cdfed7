"""How far the loss rises at a radius, along three kinds of directions."""

import functools
import math
from typing import Any, NamedTuple, Optional

import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

from fsam_optax._options import check_int
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import check_hyperparameter
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import map_weights
from fsam_optax._perturbation import sam_perturbation
from fsam_optax.sharpness import _data_passes
from fsam_optax.sharpness._data_passes import LossFn
from fsam_optax.sharpness._data_passes import data_passes
from fsam_optax.sharpness._progress import progress_bar


class LossRise(NamedTuple):
  """How far the loss rises at a radius.

  Attributes:
    mean: of the values, in units of the loss.
    standard_error: of the mean; NaN of a single value.
    values: a rise for each group of rows, or for each random direction, shape
      ``[G]``, float64; one value where there is one group.
    loss: at the parameters themselves, mean over the rows used.
  """

  mean: float
  standard_error: float
  values: np.ndarray
  loss: float


def ascent_sharpness(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  rho: float,
  *,
  rows: Optional[int] = None,
  batch_size: Optional[int] = None,
  adaptive: bool = False,
  progress: bool = False,
) -> LossRise:
  r"""The rise of the loss along its gradient, which SAM descends.

  .. math::

    L(w + \rho\, g / \lVert g \rVert) - L(w), \qquad g = \nabla L(w)

  Examples:
    >>> from fsam_optax import sharpness
    >>> import jax.numpy as jnp
    >>> loss_fn = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
    >>> data = jnp.array([[2.0, 0.0], [0.0, 2.0]])  # Hessian 2 I.
    >>> rise = sharpness.ascent_sharpness(loss_fn, jnp.ones(2), data, rho=0.1)
    >>> print(f"{rise.mean:.4f}")  # 0.1 * |g| + 0.1^2 * 2 / 2.
    0.2928

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    rho: radius, positive, in the units of the parameters (relative to them when
      adaptive).
    rows: rows of a group that ascends by itself, as a batch does in training
      (m-sharpness), successive rows each; those at the end that fill no group
      are left out. None for the whole data set as one.
    batch_size: rows at a time, in memory, those of a group at least; None
      for all of them.
    adaptive: whether to measure the radius in the metric of ASAM.
    progress: whether to show a progress bar.

  Returns:
    The rise. Where the gradient is zero it is 0.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if ``rho`` is not positive and finite, there are too few rows,
      or the loss is not finite, at the parameters or at the radius.

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
  """
  _check_radius(rho)
  if rows is not None:
    measure = (_ascent_of_group, loss_fn, bool(adaptive))
    key = jax.random.key(0)  # Not used.
    options = (rows, batch_size, progress)
    return _rise_of_groups("ascent", measure, params, data, rho, key, *options)
  with data_passes(loss_fn, data, batch_size, "ascent", progress, 2) as passes:
    loss, gradient = passes.gradient(params)
    _check_loss_is_finite(loss)
    epsilon = _ascend(adaptive, gradient, params, rho)
    risen = passes.loss(optax.tree.add(params, epsilon))
  return _rise([risen - loss], loss, rho)


def worst_sharpness(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  rho: float,
  *,
  key: jax.Array,
  steps: int = 20,
  restarts: int = 1,
  rows: Optional[int] = None,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> LossRise:
  r"""The largest rise found in the ball, by projected gradient ascent.

  .. math::

    \max_{\lVert \epsilon \rVert \le \rho} L(w + \epsilon) - L(w)

  From a random point of the sphere, each step goes ``rho`` along the
  normalized gradient, and back to the sphere if it left the ball. The result is
  a lower bound of the maximum. The ascent of :func:`ascent_sharpness` is a
  candidate, too, so the result is never below that.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    rho: radius of the ball, positive.
    key: a key of :func:`jax.random.key`, for the random points.
    steps: gradient steps from each random point, positive.
    restarts: number of random points, positive.
    rows: rows of a group that has a worst direction of its own, successive rows
      each; those at the end that fill no group are left out. None for the whole
      data set as one.
    batch_size: rows at a time, in memory, those of a group at least; None
      for all of them.
    progress: whether to show a progress bar.

  Returns:
    The rise.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if ``rho`` is not positive and finite, ``steps`` or ``restarts``
      is not positive, there are too few rows, or the loss is not finite, at the
      parameters or at the radius.
  """
  _check_radius(rho)
  check_int("steps", steps, least=1)
  check_int("restarts", restarts, least=1)
  if rows is not None:
    measure = (_worst_of_group, loss_fn, steps, restarts)
    options = (rows, batch_size, progress)
    return _rise_of_groups("worst", measure, params, data, rho, key, *options)
  total = 2 + restarts * (steps + 1)
  with data_passes(
    loss_fn, data, batch_size, "worst direction", progress, total
  ) as passes:
    loss, gradient = passes.gradient(params)
    _check_loss_is_finite(loss)
    epsilon = _ascend(False, gradient, params, rho)
    risen = [passes.loss(optax.tree.add(params, epsilon))]
    for restart_key in jax.random.split(key, restarts):
      epsilon = _random_direction(restart_key, params, rho)
      for _ in range(steps):
        value, gradient = passes.gradient(optax.tree.add(params, epsilon))
        risen.append(value)
        epsilon = _project(epsilon, gradient, rho)
      risen.append(passes.loss(optax.tree.add(params, epsilon)))
  _check_risen(risen, rho)
  return _rise([max(risen) - loss], loss, rho)


def average_sharpness(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  rho: float,
  *,
  key: jax.Array,
  samples: int = 100,
  rows: Optional[int] = None,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> LossRise:
  r"""The mean rise of the loss over random directions of one length.

  .. math::

    \mathbb{E}\, L(w + \rho u) - L(w), \qquad
    u \text{ uniform on the unit sphere}

  A random direction has little of a few sharp directions among many flat ones.
  So the radii that distinguish two models are much larger than for an ascent.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    rho: radius, positive.
    key: a key of :func:`jax.random.key`.
    samples: number of directions, positive.
    rows: rows of a group that draws directions of its own, successive rows
      each; those at the end that fill no group are left out. None for the whole
      data set as one.
    batch_size: rows at a time, in memory, those of a group at least; None
      for all of them.
    progress: whether to show a progress bar.

  Returns:
    The rise; ``values`` are those of the directions, or with ``rows`` of the
    groups, each a mean over directions.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if ``rho`` is not positive and finite, ``samples`` is not
      positive, there are too few rows, or the loss is not finite, at the
      parameters or at the radius.
  """
  _check_radius(rho)
  check_int("samples", samples, least=1)
  if rows is not None:
    measure = (_average_of_group, loss_fn, samples)
    options = (rows, batch_size, progress)
    return _rise_of_groups("average", measure, params, data, rho, key, *options)
  with data_passes(
    loss_fn, data, batch_size, "average", progress, 1 + samples
  ) as passes:
    loss = passes.loss(params)
    _check_loss_is_finite(loss)
    risen = [
      passes.loss(optax.tree.add(params, _random_direction(draw, params, rho)))
      for draw in jax.random.split(key, samples)
    ]
  return _rise([value - loss for value in risen], loss, rho)


def _rise_of_groups(
  title, measure, params, data, rho, key, rows, batch_size, progress
):
  """A measure of each group of rows, for as many groups at once as fit.

  The measure is a function with its first arguments. They compare equal at the
  next call, so that it is compiled once.
  """
  rows = _data_passes.rows_at_a_time("rows", rows, data)
  size = _data_passes.rows_at_a_time("batch_size", batch_size, data)
  groups = _data_passes.num_rows(data) // rows
  at_once = max(1, min(size // rows, groups))
  keys = jax.random.split(key, groups)
  grouped = jax.tree.map(
    lambda x: np.reshape(x[: groups * rows], (groups, rows, *np.shape(x)[1:])),
    data,
  )
  pairs = []
  with progress_bar(progress, title, math.ceil(groups / at_once)) as tick:
    for start in range(0, groups, at_once):
      part = jax.tree.map(lambda x, s=start: x[s : s + at_once], grouped)
      pair = _vmapped(measure, params, part, rho, keys[start : start + at_once])
      pairs.append(np.asarray(pair, np.float64))
      tick()
  losses, rises = np.concatenate(pairs, axis=1)
  loss = float(losses.mean())
  _check_loss_is_finite(loss)
  return _rise(rises.tolist(), loss, rho)


@functools.partial(jax.jit, static_argnums=0)
def _vmapped(measure, params, groups, rho, keys):
  fn, *first = measure
  of_group = lambda group, key: fn(*first, params, group, rho, key)
  return jax.vmap(of_group)(groups, keys)


def _ascent_of_group(loss_fn, adaptive, params, group, rho, key):
  del key
  loss, gradient = _data_passes.loss_and_gradient(loss_fn, params, group)
  epsilon = _ascend(adaptive, gradient, params, rho)
  risen = _data_passes.loss_of(loss_fn, optax.tree.add(params, epsilon), group)
  return loss, risen - loss


def _worst_of_group(loss_fn, steps, restarts, params, group, rho, key):
  at = lambda epsilon: optax.tree.add(params, epsilon)
  loss, rise = _ascent_of_group(loss_fn, False, params, group, rho, key)

  def from_point(key):
    def step(epsilon, _):
      value, gradient = _data_passes.loss_and_gradient(
        loss_fn, at(epsilon), group
      )
      return _project(epsilon, gradient, rho), value

    start = _random_direction(key, params, rho)
    epsilon, values = jax.lax.scan(step, start, length=steps)
    last = _data_passes.loss_of(loss_fn, at(epsilon), group)
    return jnp.maximum(values.max(), last)

  risen = jax.lax.map(from_point, jax.random.split(key, restarts)).max()
  return loss, jnp.maximum(rise, risen - loss)


def _average_of_group(loss_fn, samples, params, group, rho, key):
  loss = _data_passes.loss_of(loss_fn, params, group)

  def risen(key):
    epsilon = _random_direction(key, params, rho)
    return _data_passes.loss_of(loss_fn, optax.tree.add(params, epsilon), group)

  keys = jax.random.split(key, samples)
  return loss, jax.lax.map(risen, keys).mean() - loss


@functools.partial(jax.jit, static_argnums=0)
def _ascend(adaptive, gradient, params, rho):
  perturbation = sam_perturbation(rho, adaptive=adaptive)
  state, gradient = perturbation.init(params), ascent_gradient(gradient)
  return perturbation.update(gradient, state, params)[0]


@jax.jit
def _random_direction(key, params, rho):
  draw = optax.tree.random_like(key, params, jax.random.normal)
  # A complex number is two dimensions, and is drawn with the variance of one.
  wide = lambda x: x * 2**0.5 if jnp.iscomplexobj(x) else x
  draw = map_weights(wide, draw, overwritten=jnp.zeros_like)
  return optax.tree.cast_like(
    optax.tree.scale(rho / global_norm(draw), draw), params
  )


@jax.jit
def _project(epsilon, gradient, rho):
  """A step of length rho along the gradient, and back into the ball."""
  gradient = ascent_gradient(gradient)
  norm = global_norm(gradient)
  step = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
  moved = optax.tree.add_scale(epsilon, step, gradient)
  length = global_norm(moved)
  shrink = jnp.where(length > rho, rho / length, 1.0)
  return optax.tree.cast_like(optax.tree.scale(shrink, moved), epsilon)


def _rise(values, loss, rho) -> LossRise:
  _check_risen(values, rho)
  values = np.array(values, np.float64)
  error = math.nan
  if len(values) > 1:
    error = float(values.std(ddof=1) / len(values) ** 0.5)
  return LossRise(float(values.mean()), error, values, loss)


def _check_radius(rho) -> None:
  check_hyperparameter("rho", rho, can_vary=False)
  if rho == 0:
    raise ValueError(
      "`rho` must be positive, got 0: nothing rises at a radius of 0."
    )


def _check_loss_is_finite(loss) -> None:
  if not math.isfinite(loss):
    raise ValueError(
      f"`params` must have a finite loss over `data`, got {loss}. The run has "
      "diverged, or a row is not finite."
    )


def _check_risen(values, rho) -> None:
  if not np.all(np.isfinite(values)):
    raise ValueError(
      f"`rho` must leave the loss finite, got {rho:g}, at which it is not. "
      "Take a smaller radius."
    )

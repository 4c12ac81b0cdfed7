"""Measures of a trained model: sharpness, curvature and gradient noise.

They work on any loss ``loss_fn(params, batch)`` that returns the mean over the
rows of a batch, and any tree of parameters. They are no part of a train step:
each walks through a data set, compiled a batch at a time, and returns numbers
of the host. Hand them the loss of a model in evaluation mode, with dropout off
and BatchNorm's statistics fixed, and parameters in float32 at least: in
bfloat16 a small step along a direction is mostly rounding. In what follows
``N`` is the number of rows.

Three notions of sharpness at a radius are measured, because they disagree: the
rise of the loss along the gradient, which is what SAM descends
(:func:`ascent_sharpness`), along the worst direction in the ball
(:func:`worst_sharpness`), and over random directions
(:func:`average_sharpness`). Near a minimum with the Hessian :math:`H` the worst
is :math:`\\rho^2 \\lambda_{\\max}(H) / 2` and the average :math:`\\rho^2
\\operatorname{tr}(H) / 2 D` for ``D`` parameters; the ascent lies between the
least and the largest eigenvalue for the whole data set, and is :math:`\\rho^2
\\operatorname{tr}(H) / 2` for single rows (Wen, Ma and Li, `How Does
Sharpness-Aware Minimization Minimize Sharpness?
<https://arxiv.org/abs/2211.05729>`_, 2023). Say which one you report.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple, Optional

import jax
from jax import numpy as jnp
import numpy as np
import optax

from fsam_optax._options import check_int
from fsam_optax._perturbation import check_hyperparameter
from fsam_optax._perturbation import global_norm
from fsam_optax._perturbation import sam_perturbation
from fsam_optax.sharpness import _data_passes as _over_data
from fsam_optax.sharpness._hessian import SpectralDensity as SpectralDensity
from fsam_optax.sharpness._hessian import hessian_density as hessian_density
from fsam_optax.sharpness._hessian import (
  hessian_eigenvalues as hessian_eigenvalues,
)
from fsam_optax.sharpness._hessian import hessian_trace as hessian_trace

LossFn = Callable[[Any, Any], Any]


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


class GradientNoise(NamedTuple):
  """The gradients of ``B`` batches against the full gradient, all float64.

  Cosines are NaN where a vector is zero, and where there is no average.

  Attributes:
    full_norm: Euclidean norm of the full gradient.
    batch_norm: of each batch's gradient, shape ``[B]``.
    noise_norm: of each batch's gradient minus the full one, shape ``[B]``.
    batch_cosine: of batch gradient and full gradient, shape ``[B]``.
    noise_cosine: of noise and full gradient, shape ``[B]``.
    direction_cosine: of F-SAM's direction, the batch gradient minus ``sigma``
      times the average, and full gradient, shape ``[B]``.
    ema_cosine: of the average and the full gradient.
    ema_error: norm of the average minus the full gradient, over the norm of the
      full gradient.
  """

  full_norm: float
  batch_norm: np.ndarray
  noise_norm: np.ndarray
  batch_cosine: np.ndarray
  noise_cosine: np.ndarray
  direction_cosine: np.ndarray
  ema_cosine: float
  ema_error: float


def mean_loss(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> float:
  """The loss over a whole data set.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: a tree of arrays of ``N`` rows, on the host or on a device.
    batch_size: rows at a time; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    The mean over the rows. It may be infinite or NaN.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.
  """
  size = _batch_size(batch_size, data)
  with _bar(progress, "loss", data, size) as tick:
    loss = functools.partial(_over_data.loss_of, loss_fn, params)
    return float(_over_data.mean_over_batches(loss, data, size, tick))


def full_gradient(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> tuple[float, Any]:
  """The loss and its gradient over a whole data set.

  Args:
    loss_fn: see :func:`mean_loss`, as are the others.
    params: as there.
    data: as there.
    batch_size: as there.
    progress: as there.

  Returns:
    The mean loss, and the gradient in the tree, shapes and dtypes of
    ``params``.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.
  """
  size = _batch_size(batch_size, data)
  with _bar(progress, "gradient", data, size) as tick:
    both = functools.partial(_over_data.loss_and_gradient, loss_fn, params)
    loss, gradient = _over_data.mean_over_batches(both, data, size, tick)
  return float(loss), gradient


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
  r"""The rise of the loss along its gradient: what SAM descends.

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
    loss_fn: see :func:`mean_loss`.
    params: as there.
    data: as there.
    rho: radius, positive, in the units of the parameters (relative to them when
      adaptive).
    rows: rows of a group that ascends by itself, as a batch does in training
      (m-sharpness), successive rows each; those at the end that fill no group
      are left out. None for the whole data set as one.
    batch_size: rows at a time, in memory; None for all.
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
  options = (rows, batch_size, progress)
  if rows is not None:
    one = (_ascent_of_group, loss_fn, bool(adaptive))
    keys = jax.random.key(0)
    return _over_groups("ascent", one, params, data, rho, keys, *options)
  size = _batch_size(batch_size, data)
  with _bar(progress, "ascent", data, size, passes=2) as tick:
    passes = _Passes(loss_fn, data, size, tick)
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
  normalised gradient, and back to the sphere if it left the ball. The rise
  found is a lower bound of the maximum; the first candidate is the ascent of
  :func:`ascent_sharpness`, so that it is never below that.

  Args:
    loss_fn: see :func:`mean_loss`.
    params: as there.
    data: as there.
    rho: radius of the ball, positive.
    key: a key of :func:`jax.random.key`, for the random points.
    steps: gradient steps from each random point, positive.
    restarts: number of random points, positive.
    rows: see :func:`ascent_sharpness`, as are the others.
    batch_size: as there.
    progress: as there.

  Returns:
    The rise.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: as for :func:`ascent_sharpness`, and if ``steps`` or
      ``restarts`` is not positive.
  """
  _check_radius(rho)
  check_int("steps", steps, least=1)
  check_int("restarts", restarts, least=1)
  if rows is not None:
    one = (_worst_of_group, loss_fn, steps, restarts)
    options = (rows, batch_size, progress)
    return _over_groups("worst", one, params, data, rho, key, *options)
  size = _batch_size(batch_size, data)
  total = 2 + restarts * (steps + 1)
  with _bar(progress, "worst direction", data, size, passes=total) as tick:
    passes = _Passes(loss_fn, data, size, tick)
    loss, gradient = passes.gradient(params)
    _check_loss_is_finite(loss)
    epsilon = _ascend(False, gradient, params, rho)
    risen = [passes.loss(optax.tree.add(params, epsilon))]
    for own in jax.random.split(key, restarts):
      epsilon = _random_direction(own, params, rho)
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

  A random direction hardly sees a few sharp ones among many flat: radii that
  tell two models apart are much larger than those of an ascent.

  Args:
    loss_fn: see :func:`mean_loss`.
    params: as there.
    data: as there.
    rho: radius, positive.
    key: a key of :func:`jax.random.key`.
    samples: number of directions, positive.
    rows: see :func:`ascent_sharpness`; each group then draws its own.
    batch_size: as there.
    progress: as there.

  Returns:
    The rise; ``values`` are those of the directions, or with ``rows`` of the
    groups, each a mean over directions.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: as for :func:`ascent_sharpness`, and if ``samples`` is not
      positive.
  """
  _check_radius(rho)
  check_int("samples", samples, least=1)
  if rows is not None:
    one = (_average_of_group, loss_fn, samples)
    options = (rows, batch_size, progress)
    return _over_groups("average", one, params, data, rho, key, *options)
  size = _batch_size(batch_size, data)
  with _bar(progress, "average", data, size, passes=1 + samples) as tick:
    passes = _Passes(loss_fn, data, size, tick)
    loss = passes.loss(params)
    _check_loss_is_finite(loss)
    risen = [
      passes.loss(optax.tree.add(params, _random_direction(own, params, rho)))
      for own in jax.random.split(key, samples)
    ]
  return _rise([value - loss for value in risen], loss, rho)


def gradient_noise(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  rows: int,
  ema: Any = None,
  sigma: float = 1.0,
  progress: bool = False,
) -> GradientNoise:
  """The gradients of batches, their noise and the average, against the whole.

  Args:
    loss_fn: see :func:`mean_loss`.
    params: as there.
    data: the training data, as there. Shuffle it where its order means
      something.
    rows: rows of a batch, successive ones; those at the end that fill no batch
      count in the full gradient alone.
    ema: the moving average of a run, in the tree of ``params``:
      ``optax.tree.get(state.perturbation_state, "ema")``. None for none.
    sigma: share of the average that is subtracted, finite and non-negative.
    progress: whether to show a progress bar.

  Returns:
    The norms and cosines.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are fewer than ``rows`` rows, the structure of ``ema``
      is not that of ``params``, or the full gradient is not finite.
  """
  check_hyperparameter("sigma", sigma, can_vary=False)
  check_int("rows", rows, least=1)
  size = _over_data.batch_rows("rows", rows, _over_data.num_rows(data))
  if ema is not None and jax.tree.structure(ema) != jax.tree.structure(params):
    raise ValueError(
      "`ema` must have the structure of `params`, "
      f"{jax.tree.structure(params)}, got {jax.tree.structure(ema)}."
    )
  found = []
  with _bar(progress, "gradients", data, size, passes=2) as tick:
    gradient_of = functools.partial(
      _over_data.loss_and_gradient, loss_fn, params
    )
    _, full = _over_data.mean_over_batches(gradient_of, data, size, tick)
    full_norm = float(global_norm(full))
    if not math.isfinite(full_norm):
      raise ValueError(
        "`params` must have a finite gradient over `data`, got one of norm "
        f"{full_norm}. The run has diverged."
      )
    for i in range(_over_data.num_rows(data) // size):
      at = slice(i * size, (i + 1) * size)
      batch = jax.tree.map(lambda x, at=at: x[at], data)
      _, gradient = gradient_of(batch)
      found.append(_against(gradient, full, ema, sigma))
      tick()
  columns = np.array(found, np.float64).T
  ema_cosine = ema_error = math.nan
  if ema is not None:
    ema_cosine = float(_cosine(ema, full))
    difference = global_norm(optax.tree.sub(ema, full))
    ema_error = float(difference) / full_norm if full_norm else math.nan
  return GradientNoise(
    full_norm, *columns, ema_cosine=ema_cosine, ema_error=ema_error
  )


def loss_along_line(
  loss_fn: LossFn,
  params: Any,
  direction: Any,
  data: Any,
  distances: Sequence[float],
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> np.ndarray:
  """The loss at ``params + distance * direction``.

  Args:
    loss_fn: see :func:`mean_loss`.
    params: as there.
    direction: in the tree of ``params``: an ascent, the way to another model,
      or :func:`filter_normalized_direction`.
    data: as there.
    distances: in units of the direction, shape ``[K]``.
    batch_size: as there.
    progress: as there.

  Returns:
    The losses, shape ``[K]``, float64; infinite or NaN where the loss is.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.
  """
  zero = jax.tree.map(jnp.zeros_like, direction)
  return loss_on_plane(
    loss_fn,
    params,
    (direction, zero),
    data,
    distances,
    [0.0],
    batch_size=batch_size,
    progress=progress,
  )[0]


def loss_on_plane(
  loss_fn: LossFn,
  params: Any,
  directions: tuple[Any, Any],
  data: Any,
  x: Sequence[float],
  y: Sequence[float],
  *,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> np.ndarray:
  """The loss at ``params + x * directions[0] + y * directions[1]``.

  Args:
    loss_fn: see :func:`mean_loss`.
    params: as there.
    directions: two, in the tree of ``params``.
    data: as there.
    x: multiples of the first direction, shape ``[K]``.
    y: multiples of the second, shape ``[J]``.
    batch_size: as there.
    progress: as there.

  Returns:
    The losses, shape ``[J, K]``, float64; infinite or NaN where the loss is.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are no rows, or fewer than ``batch_size``.

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """
  size = _batch_size(batch_size, data)
  points = len(x) * len(y)
  with _bar(progress, "loss on a plane", data, size, passes=points) as tick:
    passes = _Passes(loss_fn, data, size, tick)
    return np.array(
      [[passes.loss(_move(params, directions, a, b)) for a in x] for b in y],
      np.float64,
    )


def filter_normalized_direction(key: jax.Array, params: Any) -> Any:
  """A random direction whose every filter is as long as that of the weights.

  Scale-invariant layers make plain directions incomparable between models. A
  filter is what feeds one output, the last axis of a Flax kernel; arrays of
  fewer than two axes (biases, norms) stay where they are.

  Args:
    key: a key of :func:`jax.random.key`.
    params: the parameters.

  Returns:
    The direction, in the tree, shapes and dtypes of ``params``.

  References:
    Li et al., `Visualizing the Loss Landscape of Neural Nets
    <https://arxiv.org/abs/1712.09913>`_, 2018
  """

  def scale(draw, weights):
    if weights.ndim < 2:
      return jnp.zeros_like(weights)
    axes = tuple(range(weights.ndim - 1))
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))
    return draw * norm(weights) / jnp.maximum(norm(draw), 1e-12)

  draws = optax.tree.random_like(key, params, jax.random.normal)
  return jax.tree.map(scale, draws, params)


class _Passes:
  """Losses and gradients over one data set."""

  def __init__(self, loss_fn, data, batch_size, tick):
    self._loss_fn = loss_fn
    self._over = lambda fn: _over_data.mean_over_batches(
      fn, data, batch_size, tick
    )

  def loss(self, params) -> float:
    of = functools.partial(_over_data.loss_of, self._loss_fn, params)
    return float(self._over(of))

  def gradient(self, params) -> tuple[float, Any]:
    of = functools.partial(_over_data.loss_and_gradient, self._loss_fn, params)
    loss, gradient = self._over(of)
    return float(loss), gradient


def _over_groups(
  title, one, params, data, rho, key, rows, batch_size, progress
):
  """A measure of each group of rows, as many groups at once as fit.

  The measure comes as a function and its first arguments, which compare equal
  at the next call, so that it is compiled once.
  """
  number = _over_data.num_rows(data)
  rows = _over_data.batch_rows("rows", rows, number)
  size = _over_data.batch_rows("batch_size", batch_size, number)
  groups = number // rows
  at_once = max(1, min(size // rows, groups))
  keys = jax.random.split(key, groups)
  grouped = jax.tree.map(
    lambda x: np.reshape(x[: groups * rows], (groups, rows, *np.shape(x)[1:])),
    data,
  )
  found = []
  total = _over_data.num_batches(groups, at_once)
  with _over_data.progress_bar(progress, title, total) as tick:
    for start in range(0, groups, at_once):
      part = jax.tree.map(lambda x, s=start: x[s : s + at_once], grouped)
      pair = _vmapped(one, params, part, rho, keys[start : start + at_once])
      found.append(np.asarray(pair, np.float64))
      tick()
  losses, rises = np.concatenate(found, axis=1)
  loss = float(losses.mean())
  _check_loss_is_finite(loss)
  return _rise(rises.tolist(), loss, rho)


@functools.partial(jax.jit, static_argnums=0)
def _vmapped(one, params, groups, rho, keys):
  fn, *first = one
  of_group = lambda group, key: fn(*first, params, group, rho, key)
  return jax.vmap(of_group)(groups, keys)


def _ascent_of_group(loss_fn, adaptive, params, group, rho, key):
  del key
  loss, gradient = _over_data.loss_and_gradient(loss_fn, params, group)
  epsilon = _ascend(adaptive, gradient, params, rho)
  risen = _over_data.loss_of(loss_fn, optax.tree.add(params, epsilon), group)
  return loss, risen - loss


def _worst_of_group(loss_fn, steps, restarts, params, group, rho, key):
  at = lambda epsilon: optax.tree.add(params, epsilon)
  loss, rise = _ascent_of_group(loss_fn, False, params, group, rho, key)

  def from_point(key):
    def step(epsilon, _):
      value, gradient = _over_data.loss_and_gradient(
        loss_fn, at(epsilon), group
      )
      return _project(epsilon, gradient, rho), value

    start = _random_direction(key, params, rho)
    epsilon, values = jax.lax.scan(step, start, length=steps)
    last = _over_data.loss_of(loss_fn, at(epsilon), group)
    return jnp.maximum(values.max(), last)

  risen = jax.lax.map(from_point, jax.random.split(key, restarts)).max()
  return loss, jnp.maximum(rise, risen - loss)


def _average_of_group(loss_fn, samples, params, group, rho, key):
  loss = _over_data.loss_of(loss_fn, params, group)

  def risen(key):
    epsilon = _random_direction(key, params, rho)
    return _over_data.loss_of(loss_fn, optax.tree.add(params, epsilon), group)

  keys = jax.random.split(key, samples)
  return loss, jax.lax.map(risen, keys).mean() - loss


@functools.partial(jax.jit, static_argnums=0)
def _ascend(adaptive, gradient, params, rho):
  perturbation = sam_perturbation(rho, adaptive=adaptive)
  return perturbation.update(gradient, perturbation.init(params), params)[0]


@jax.jit
def _random_direction(key, params, rho):
  draw = optax.tree.random_like(key, params, jax.random.normal)
  return optax.tree.cast_like(
    optax.tree.scale(rho / global_norm(draw), draw), params
  )


@jax.jit
def _project(epsilon, gradient, rho):
  """A step of length rho along the gradient, and back into the ball."""
  norm = global_norm(gradient)
  step = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1.0), 0.0)
  moved = optax.tree.add_scale(epsilon, step, gradient)
  length = global_norm(moved)
  shrink = jnp.where(length > rho, rho / length, 1.0)
  return optax.tree.cast_like(optax.tree.scale(shrink, moved), epsilon)


@jax.jit
def _move(params, directions, a, b):
  return jax.tree.map(
    lambda w, u, v: (w + a * u + b * v).astype(w.dtype), params, *directions
  )


def _cosine(a, b):
  inner = optax.tree.vdot(a, b)
  return jnp.real(inner) / (global_norm(a) * global_norm(b))  # NaN at zero.


@jax.jit
def _against(gradient, full, ema, sigma):
  noise = optax.tree.sub(gradient, full)
  direction = gradient
  if ema is not None:
    direction = optax.tree.add_scale(gradient, -sigma, ema)
  return (
    global_norm(gradient),
    global_norm(noise),
    _cosine(gradient, full),
    _cosine(noise, full),
    _cosine(direction, full) if ema is not None else jnp.nan,
  )


def _batch_size(batch_size, data) -> int:
  number = _over_data.num_rows(data)
  return _over_data.batch_rows("batch_size", batch_size, number)


def _bar(is_shown, title, data, batch_size, passes=1):
  total = _over_data.num_batches(_over_data.num_rows(data), batch_size)
  return _over_data.progress_bar(is_shown, title, passes * total)


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

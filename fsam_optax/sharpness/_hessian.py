"""The Hessian of a loss over a data set, by matfree's matrix-free methods."""

import functools
from typing import Any, NamedTuple, Optional

import jax
from jax import flatten_util
from jax import numpy as jnp
import numpy as np

from fsam_optax._options import check_int
from fsam_optax._trees import leaves_by_path
from fsam_optax.sharpness import _data_passes
from fsam_optax.sharpness._data_passes import LossFn
from fsam_optax.sharpness._progress import progress_bar


class SpectralDensity(NamedTuple):
  """Where the eigenvalues of a Hessian lie: nodes with weights.

  Attributes:
    nodes: Ritz values of each random vector's Lanczos run, shape ``[S, K]``,
      float64.
    weights: their weights, shape ``[S, K]``, float64; each row sums to 1.
  """

  nodes: np.ndarray
  weights: np.ndarray

  def at(self, values: Any, width: float) -> np.ndarray:
    """The density, smoothed by a Gaussian.

    Args:
      values: eigenvalues, shape ``[V]``.
      width: standard deviation of the Gaussian, positive, in units of the
        eigenvalues.

    Returns:
      The density per unit of eigenvalue, shape ``[V]``, float64, which
      integrates to 1.

    Raises:
      ValueError: if ``width`` is not positive.
    """
    if not width > 0:
      raise ValueError(f"`width` must be positive, got {width}.")
    distance = (np.atleast_1d(values)[:, None, None] - self.nodes) / width
    bumps = np.exp(-(distance**2) / 2) / (width * (2 * np.pi) ** 0.5)
    return np.mean(np.sum(bumps * self.weights, axis=2), axis=1)


def hessian_eigenvalues(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  num: int = 1,
  *,
  key: jax.Array,
  num_matvecs: Optional[int] = None,
  batch_size: Optional[int] = None,
) -> np.ndarray:
  """The largest eigenvalues of the Hessian of the mean loss, by Lanczos.

  Needs matfree. Memory: ``num_matvecs`` copies of the parameters.

  Examples:
    >>> import jax, jax.numpy as jnp
    >>> from fsam_optax import sharpness
    >>> loss_fn = lambda w, batch: 0.5 * jnp.mean((batch @ w) ** 2)
    >>> data = jnp.diag(jnp.array([3.0, 2.0, 1.0])) * 3**0.5
    >>> values = sharpness.hessian_eigenvalues(
    ...   loss_fn, jnp.ones(3), data, 2, key=jax.random.key(0)
    ... )
    >>> print(values.round(3))
    [9. 4.]

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows, twice
      differentiable.
    params: the parameters, a tree of float32 or float64 arrays of ``D`` numbers
      together.
    data: a tree of arrays of ``N`` rows.
    num: number of eigenvalues, positive, at most ``D``. One that occurs several
      times is found once, except where there is no other.
    key: a key of :func:`jax.random.key`, for the vector to start from.
    num_matvecs: Hessian-vector products over the data, at least ``num``; None
      for four times ``num`` and 20 more, at most ``D``. The more, the closer
      the inner ones.
    batch_size: rows at a time; None for all of them.

  Returns:
    The eigenvalues, the largest first, shape ``[num]``, float64.

  Raises:
    ImportError: if matfree is not installed.
    TypeError: if the loss is not a scalar, or a parameter is of another dtype
      than float32 and float64.
    ValueError: if a number is out of its range, not so many eigenvalues differ
      in the dtype of the parameters, or one is not finite.

  References:
    Lanczos, An iteration method for the solution of the eigenvalue problem of
    linear differential and integral operators, 1950
  """
  _check_requirements(params)
  num_params = sum(np.size(x) for x in jax.tree.leaves(params))
  _check_at_most_parameters("num", num, num_params)
  if num_matvecs is None:
    num_matvecs = min(4 * num + 20, num_params)
  _check_at_most_parameters("num_matvecs", num_matvecs, num_params)
  if num_matvecs < num:
    raise ValueError(
      f"`num_matvecs` must be at least `num`, {num}, got {num_matvecs}."
    )
  size = _data_passes.rows_at_a_time("batch_size", batch_size, data)
  values, _ = _spectrum(loss_fn, num_matvecs, size, params, data, key)
  if len(values) == 1:  # Of a random vector: a multiple of the identity.
    values = np.repeat(values, num)
  if len(values) < num:
    raise ValueError(
      f"`num` must be at most {len(values)}, the number of eigenvalues that "
      f"the dtype of the parameters tells apart here, got {num}."
    )
  return values[::-1][:num]


def hessian_trace(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  key: jax.Array,
  samples: int = 30,
  batch_size: Optional[int] = None,
) -> tuple[float, float]:
  """The trace of the Hessian of the mean loss, by Hutchinson's estimator.

  Needs matfree.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows, twice
      differentiable.
    params: the parameters, a tree of float32 or float64 arrays.
    data: a tree of arrays of ``N`` rows.
    key: a key of :func:`jax.random.key`, for the vectors of random signs.
    samples: number of vectors, two at least.
    batch_size: rows at a time; None for all of them.

  Returns:
    The trace and its standard error.

  Raises:
    ImportError: if matfree is not installed.
    TypeError: if the loss is not a scalar, or a parameter is of another dtype
      than float32 and float64.
    ValueError: if ``samples`` is below 2, or the trace is not finite.

  References:
    Hutchinson, A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines, 1989
  """
  _check_requirements(params)
  check_int("samples", samples, least=2)
  size = _data_passes.rows_at_a_time("batch_size", batch_size, data)
  draws = [
    _quadratic_form(loss_fn, size, params, data, draw)
    for draw in jax.random.split(key, samples)
  ]
  values = np.array(draws, np.float64)
  _check_finite(values)
  return float(values.mean()), float(values.std(ddof=1) / samples**0.5)


def hessian_density(
  loss_fn: LossFn,
  params: Any,
  data: Any,
  *,
  key: jax.Array,
  num_matvecs: Optional[int] = None,
  samples: int = 5,
  batch_size: Optional[int] = None,
  progress: bool = False,
) -> SpectralDensity:
  """The spectral density of the Hessian, by stochastic Lanczos quadrature.

  Needs matfree.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows, twice
      differentiable.
    params: the parameters, a tree of float32 or float64 arrays.
    data: a tree of arrays of ``N`` rows.
    key: a key of :func:`jax.random.key`, for the vectors to start from.
    num_matvecs: products for each vector; None for 40, at most one a parameter.
    samples: number of vectors, positive.
    batch_size: rows at a time; None for all of them.
    progress: whether to show a progress bar.

  Returns:
    Nodes and weights, both 0 where there are fewer.

  Raises:
    ImportError: if matfree is not installed.
    TypeError: if the loss is not a scalar, or a parameter is of another dtype
      than float32 and float64.
    ValueError: if a number is out of its range, or an eigenvalue not finite.

  References:
    Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
    Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
  """
  _check_requirements(params)
  num_params = sum(np.size(x) for x in jax.tree.leaves(params))
  if num_matvecs is None:
    num_matvecs = min(40, num_params)
  _check_at_most_parameters("num_matvecs", num_matvecs, num_params)
  check_int("samples", samples, least=1)
  size = _data_passes.rows_at_a_time("batch_size", batch_size, data)
  nodes, weights = np.zeros((2, samples, num_matvecs))
  with progress_bar(progress, "Lanczos", samples) as tick:
    for i, draw in enumerate(jax.random.split(key, samples)):
      values, own = _spectrum(loss_fn, num_matvecs, size, params, data, draw)
      nodes[i, : len(values)], weights[i, : len(own)] = values, own
      tick()
  return SpectralDensity(nodes, weights)


def _matvec(loss_fn, batch_size, params, data):
  """Parameters as a vector, and the product of the Hessian with one."""
  flat, unravel = flatten_util.ravel_pytree(params)

  def product(vector):
    def of_batch(batch):
      loss = lambda w: _data_passes.loss_of(loss_fn, unravel(w), batch)
      return jax.jvp(jax.grad(loss), (flat,), (vector,))[1]

    return _data_passes.traced_mean_over_batches(of_batch, data, batch_size)

  return flat, product


def _spectrum(loss_fn, num_matvecs, batch_size, params, data, key):
  """Ritz values of a random vector, ascending, and the weight of each."""
  found = _tridiagonal(loss_fn, num_matvecs, batch_size, params, data, key)
  small, scale = jax.device_get(found)
  # Where the Hessian has no more eigenvalues that differ, the next vector of
  # Lanczos would be rounding. Its length is below the diagonal.
  middle, below = np.diag(small), np.diag(small, -1)
  size = np.maximum.accumulate(np.maximum(np.abs(middle[:-1]), below))
  rounding = 10 * np.finfo(small.dtype).eps
  rank = 1 + np.sum(np.cumprod(below > rounding * size))
  small = np.tril(small[:rank, :rank].astype(np.float64)) * float(scale)
  _check_finite(small)
  values, vectors = np.linalg.eigh(small)  # Which reads the lower triangle.
  return values, np.square(vectors[0])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _tridiagonal(loss_fn, num_matvecs, batch_size, params, data, key):
  """The Hessian in Lanczos' basis, and its unit."""
  from matfree import decomp

  flat, product = _matvec(loss_fn, batch_size, params, data)
  start = jax.random.normal(key, flat.shape, flat.dtype)
  unit = jnp.abs(product(start)).max()  # Else squares may leave float32.
  unit = jnp.where(unit > 0, unit, 1)
  decompose = decomp.hessenberg(num_matvecs, reortho="full", custom_vjp=False)
  small = decompose(lambda vector: product(vector) / unit, start).J_small
  return small, unit


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quadratic_form(loss_fn, batch_size, params, data, key):
  """Hutchinson's estimate by one vector of random signs."""
  from matfree import stochtrace

  flat, product = _matvec(loss_fn, batch_size, params, data)
  estimate = stochtrace.estimator_monte_carlo(
    stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(flat, num=1)
  )
  return estimate(product, key)


def _check_requirements(params) -> None:
  """Refuses parameters of other dtypes, and to go on without matfree."""
  try:
    import matfree  # noqa: F401
  except ImportError as error:
    raise ImportError(
      'The Hessian needs matfree. Run: pip install "matfree>=0.6"'
    ) from error
  for path, x in leaves_by_path(params):
    dtype = jnp.result_type(x)
    if dtype not in (jnp.float32, jnp.float64):
      raise TypeError(
        "`params` must be float32 or float64 for the Hessian, got "
        f"{dtype} at {path}. Cast them; the loss may cast them back."
      )


def _check_at_most_parameters(name, value, most) -> None:
  check_int(name, value, least=1)
  if value > most:
    raise ValueError(
      f"`{name}` must be at most the number of parameters, {most}, got {value}."
    )


def _check_finite(values) -> None:
  if not np.all(np.isfinite(values)):
    raise ValueError(
      "`params` must have a finite Hessian over `data`, got values that are "
      "not. The run has diverged, or a row is not finite."
    )

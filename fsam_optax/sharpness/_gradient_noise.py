"""The noise of batch gradients, and the average, against the full gradient."""

import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

from fsam_optax import _fsam
from fsam_optax._options import check_int
from fsam_optax._perturbation import ascent_gradient
from fsam_optax._perturbation import check_hyperparameter
from fsam_optax._perturbation import global_norm
from fsam_optax._trees import cosine
from fsam_optax.sharpness import _data_passes
from fsam_optax.sharpness._data_passes import LossFn
from fsam_optax.sharpness._data_passes import data_passes


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
  """Norms and cosines of batch gradients, their noise and the average.

  Args:
    loss_fn: ``loss_fn(params, batch)`` returns the mean over the rows of the
      batch, a scalar. Compiled once for each function object and batch shape.
    params: the parameters, any tree of arrays.
    data: the training data, a tree of arrays of ``N`` rows. Shuffle them if
      they are sorted.
    rows: number of successive rows of a batch. Rows at the end that fill no
      batch count in the full gradient alone.
    ema: the moving average of a run, the arrays of ``params`` by name:
      ``optax.tree.get(state.perturbation_state, "ema")``. None for none.
    sigma: fraction of the average that is subtracted, finite and non-negative.
    progress: whether to show a progress bar.

  Returns:
    The norms and cosines.

  Raises:
    TypeError: if the loss is not a scalar.
    ValueError: if there are fewer than ``rows`` rows, the arrays of ``ema`` are
      not those of ``params``, or the full gradient is not finite.
  """
  check_hyperparameter("sigma", sigma, can_vary=False)
  check_int("rows", rows, least=1)
  rows = _data_passes.rows_at_a_time("rows", rows, data)
  if ema is not None:
    if differing := _fsam.difference(params, ema, dtypes=False):
      raise ValueError(
        f"`ema` must hold the arrays of `params`, with {differing}. Of a state "
        "that `jax.pmap` has stacked give one replica's; of a run with a mask "
        "give the selected parameters alone, and close over the others."
      )
    # In the containers of `params`: NNX has other Variables in its state.
    own = _fsam.leaves_by_names(ema)
    leaves = [own[names] for names in _fsam.leaves_by_names(params)]
    ema = jax.tree.unflatten(jax.tree.structure(params), leaves)
  measured = []
  with data_passes(loss_fn, data, rows, "gradients", progress, 2) as passes:
    full = ascent_gradient(passes.gradient(params)[1])
    full_norm = float(global_norm(full))
    if not math.isfinite(full_norm):
      raise ValueError(
        "`params` must have a finite gradient over `data`, got one of norm "
        f"{full_norm}. The run has diverged."
      )
    last = _data_passes.num_rows(data) - rows
    for start in range(0, last + 1, rows):
      at = slice(start, start + rows)
      batch = jax.tree.map(lambda x, at=at: x[at], data)
      _, gradient = _data_passes.loss_and_gradient(loss_fn, params, batch)
      measured.append(_against(ascent_gradient(gradient), full, ema, sigma))
      passes.tick()
  columns = np.array(measured, np.float64).T
  ema_cosine = ema_error = math.nan
  if ema is not None:
    ema_cosine = float(cosine(ema, full, at_zero=math.nan))
    difference = global_norm(optax.tree.sub(ema, full))
    ema_error = float(difference) / full_norm if full_norm else math.nan
  return GradientNoise(
    full_norm, *columns, ema_cosine=ema_cosine, ema_error=ema_error
  )


@jax.jit
def _against(gradient, full, ema, sigma):
  noise = optax.tree.sub(gradient, full)
  direction = gradient
  if ema is not None:
    direction = optax.tree.add_scale(gradient, -sigma, ema)
  return (
    global_norm(gradient),
    global_norm(noise),
    cosine(gradient, full, at_zero=math.nan),
    cosine(noise, full, at_zero=math.nan),
    cosine(direction, full, at_zero=math.nan) if ema is not None else jnp.nan,
  )

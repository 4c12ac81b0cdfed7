"""The record of numbers about the two passes of a step."""

from typing import NamedTuple

import jax


class SharpnessInfo(NamedTuple):
  """Numbers about the two passes, scalars of shape ``[]``.

  A compiled step does not compute a field that is not used.

  Attributes:
    perturbed_value: loss at the perturbed parameters, dtype of the loss. The
      sharpness is this minus the loss. Where a gate skips the ascent it is the
      loss.
    gradient_norm: Euclidean norm of the gradient at the clean parameters, on
      the rows of the ascent. With ``sync_perturbation=False`` it is the mean of
      the norms of the replicas and micro-batches, unless their mean gradient
      updates the average.
    direction_norm: the norm that divides the radius: for F-SAM of the gradient
      minus the average, times the absolute weights where the perturbation is
      adaptive. Not finite where the gradient is not. The mean over replicas and
      micro-batches where each has its own. Where groups of parameters have
      radii of their own, the root of the sum of the squares.
    perturbation_norm: Euclidean norm of the perturbation; the mean over
      replicas and micro-batches where each has its own, 0 where a gate skips
      the ascent. For parameters narrower than float32, of the perturbed
      parameters minus the parameters, which are rounded.
    gradient_ema_cosine: cosine between the gradient of ``gradient_norm`` and
      the moving average before the step; 0 without an average, or where one of
      them is zero. Of several averages it is the first one's.
  """

  perturbed_value: jax.Array
  gradient_norm: jax.Array
  direction_norm: jax.Array
  perturbation_norm: jax.Array
  gradient_ema_cosine: jax.Array

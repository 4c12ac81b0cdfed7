"""A radius tied to the learning rate."""

from jax import core
from jax import numpy as jnp
import optax

from fsam_optax._perturbation import check_hyperparameter


def radius_schedule(
  learning_rate: optax.Schedule,
  rho_min: float,
  rho_max: float,
  *,
  learning_rate_min: float = 0.0,
  learning_rate_max: float,
) -> optax.Schedule:
  r"""A schedule of ``rho`` that follows the learning rate.

  .. math::

    \rho_t = \rho_{\min} + (\rho_{\max} - \rho_{\min})
      \frac{\gamma_t - \gamma_{\min}}{\gamma_{\max} - \gamma_{\min}}

  where :math:`\gamma_t` is the learning rate at step t, clipped to its range.

  Examples:
    >>> import fsam_optax, optax
    >>> learning_rate = optax.cosine_decay_schedule(0.1, decay_steps=100)
    >>> rho = fsam_optax.radius_schedule(
    ...   learning_rate, rho_min=0.05, rho_max=0.2, learning_rate_max=0.1
    ... )
    >>> print(f"{rho(0):.3f} {rho(50):.3f} {rho(100):.3f}")
    0.200 0.125 0.050
    >>> tx = optax.chain(fsam_optax.fsam(rho), optax.sgd(learning_rate))

  Args:
    learning_rate: schedule of the base optimizer.
    rho_min: radius at ``learning_rate_min``, finite and non-negative.
    rho_max: radius at ``learning_rate_max``, finite and non-negative.
    learning_rate_min: smallest learning rate; it may be traced.
    learning_rate_max: largest learning rate, above the smallest; it may be
      traced.

  Returns:
    A schedule, from the step to the radius.

  Raises:
    TypeError: if ``learning_rate`` is not callable, or a radius is no number.
    ValueError: if a radius is negative or not finite, or the largest learning
      rate is not above the smallest.

  References:
    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  if not callable(learning_rate):
    raise TypeError(
      "`learning_rate` must be a schedule, a callable of the step, got "
      f"{learning_rate!r}. For a constant radius, give `rho` as a number."
    )
  check_hyperparameter("rho_min", rho_min, can_vary=False)
  check_hyperparameter("rho_max", rho_max, can_vary=False)
  ends = learning_rate_min, learning_rate_max
  is_traced = any(isinstance(x, core.Tracer) for x in ends)
  if not is_traced and not float(learning_rate_max) > float(learning_rate_min):
    raise ValueError(
      "`learning_rate_max` must be above `learning_rate_min`, got "
      f"{learning_rate_max} and {learning_rate_min}. Give the peak of "
      "`learning_rate`."
    )

  def schedule(count):
    fraction = (learning_rate(count) - learning_rate_min) / (
      learning_rate_max - learning_rate_min
    )
    return rho_min + (rho_max - rho_min) * jnp.clip(fraction, 0.0, 1.0)

  return schedule

"""The optimizer of a run: its learning rate, its descent and its ascent."""

from typing import Optional

from jax import numpy as jnp
import optax

from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.flags import MASKS


def learning_rate(config: Config, steps: int) -> optax.Schedule:
  """The learning rate at each step: a cosine from the first to 0 after all."""
  return optax.cosine_decay_schedule(config.descent.learning_rate, steps)


def descent(config: Config, steps: int) -> optax.GradientTransformation:
  """SGD with momentum and, as the authors have it, coupled weight decay."""
  return optax.chain(
    # Before the momentum, which so averages the decay too: PyTorch's SGD.
    optax.add_decayed_weights(config.descent.weight_decay),
    optax.sgd(
      learning_rate(config, steps),
      momentum=config.descent.momentum,
      nesterov=config.descent.nesterov,
    ),
  )


def perturbation(config: Config) -> Optional[optax.GradientTransformation]:
  """The ascent of the optimizer, None for SGD."""
  ascent = config.ascent
  dtype = ascent.accumulator_dtype
  return optimizers.perturbation(
    ascent.optimizer,
    rho=ascent.rho,
    sigma=ascent.sigma,
    lmbda=ascent.lmbda,
    adaptive=ascent.adaptive,
    mask=MASKS[ascent.mask],
    order=ascent.order,
    accumulator_dtype=None if dtype is None else jnp.dtype(dtype),
    eta=ascent.eta,
  )

"""Friendly Sharpness-Aware Minimization (F-SAM) for JAX.

F-SAM perturbs the weights along the mini-batch gradient minus a moving average
of past gradients, and updates with the gradient at the perturbed weights (Li et
al., CVPR 2024, https://arxiv.org/abs/2403.12350). In a loop with optax two
lines change::

  tx = optax.chain(fsam_optax.fsam(rho=0.05), optax.sgd(0.1, momentum=0.9))
  opt_state = tx.init(params)
  for batch in batches:
    grads = jax.grad(loss_fn)(params, batch)
    updates, opt_state = tx.update(
      grads, opt_state, params, grad_fn=lambda p: jax.grad(loss_fn)(p, batch)
    )
    params = optax.apply_updates(params, updates)

:func:`value_and_grad` takes both passes for any optimizer. Flax Linen loops
with BatchNorm and dropout use :class:`TrainState` and :func:`make_train_step`;
Flax NNX loops use :class:`fsam_optax.nnx.Optimizer`.
"""

from fsam_optax import checkpoint as checkpoint
from fsam_optax import masks as masks
from fsam_optax import nnx as nnx
from fsam_optax import sharding as sharding
from fsam_optax import sharpness as sharpness
from fsam_optax._fsam import fsam as fsam
from fsam_optax._fsam import sharpness_aware as sharpness_aware
from fsam_optax._perturbation import ScaleToRadiusState as ScaleToRadiusState
from fsam_optax._perturbation import (
  SubtractGradientEmaState as SubtractGradientEmaState,
)
from fsam_optax._perturbation import (
  friendly_perturbation as friendly_perturbation,
)
from fsam_optax._perturbation import sam_perturbation as sam_perturbation
from fsam_optax._perturbation import scale_to_radius as scale_to_radius
from fsam_optax._perturbation import (
  subtract_gradient_ema as subtract_gradient_ema,
)
from fsam_optax._radius_schedule import radius_schedule as radius_schedule
from fsam_optax._train_state import TrainState as TrainState
from fsam_optax._train_step import make_train_step as make_train_step
from fsam_optax._two_passes import SharpnessInfo as SharpnessInfo
from fsam_optax._value_and_grad import value_and_grad as value_and_grad

__version__ = "0.1.0"

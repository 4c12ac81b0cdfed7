"""Measures of a trained model: sharpness, curvature and gradient noise."""

from fsam_optax.sharpness._hessian import SpectralDensity as SpectralDensity
from fsam_optax.sharpness._hessian import hessian_density as hessian_density
from fsam_optax.sharpness._hessian import (
  hessian_eigenvalues as hessian_eigenvalues,
)
from fsam_optax.sharpness._hessian import hessian_trace as hessian_trace
from fsam_optax.sharpness._rise import GradientNoise as GradientNoise
from fsam_optax.sharpness._rise import LossRise as LossRise
from fsam_optax.sharpness._rise import ascent_sharpness as ascent_sharpness
from fsam_optax.sharpness._rise import average_sharpness as average_sharpness
from fsam_optax.sharpness._rise import (
  filter_normalized_direction as filter_normalized_direction,
)
from fsam_optax.sharpness._rise import full_gradient as full_gradient
from fsam_optax.sharpness._rise import gradient_noise as gradient_noise
from fsam_optax.sharpness._rise import loss_along_line as loss_along_line
from fsam_optax.sharpness._rise import loss_on_plane as loss_on_plane
from fsam_optax.sharpness._rise import mean_loss as mean_loss
from fsam_optax.sharpness._rise import worst_sharpness as worst_sharpness

"""Measures of a trained model: sharpness, curvature and gradient noise.

They work on any loss ``loss_fn(params, batch)`` that returns the mean over the
rows of a batch, and any tree of parameters. They are not a part of a train
step: each goes through a data set, one compiled batch at a time, and returns
numbers on the host. Give them the loss of a model in evaluation mode, without
dropout and with fixed statistics of BatchNorm. A loss is compiled once for each
function object, and keeps what it closes over, such as those statistics, as it
was then: make the function anew for each measurement of a run. Give parameters
in float32 at least, because in bfloat16 a small step is mostly rounding. Along
explicit axes of a mesh neither data nor, for the Hessian, parameters may lie.
Below, ``N`` is the number of rows. The numbers that a train step reports about
itself are in :class:`fsam_optax.SharpnessInfo`.

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

from fsam_optax.sharpness._data_passes import full_gradient as full_gradient
from fsam_optax.sharpness._data_passes import mean_loss as mean_loss
from fsam_optax.sharpness._gradient_noise import GradientNoise as GradientNoise
from fsam_optax.sharpness._gradient_noise import (
  gradient_noise as gradient_noise,
)
from fsam_optax.sharpness._hessian import SpectralDensity as SpectralDensity
from fsam_optax.sharpness._hessian import hessian_density as hessian_density
from fsam_optax.sharpness._hessian import (
  hessian_eigenvalues as hessian_eigenvalues,
)
from fsam_optax.sharpness._hessian import hessian_trace as hessian_trace
from fsam_optax.sharpness._landscape import (
  filter_normalized_direction as filter_normalized_direction,
)
from fsam_optax.sharpness._landscape import loss_along_line as loss_along_line
from fsam_optax.sharpness._landscape import loss_on_plane as loss_on_plane
from fsam_optax.sharpness._rise import LossRise as LossRise
from fsam_optax.sharpness._rise import ascent_sharpness as ascent_sharpness
from fsam_optax.sharpness._rise import average_sharpness as average_sharpness
from fsam_optax.sharpness._rise import worst_sharpness as worst_sharpness

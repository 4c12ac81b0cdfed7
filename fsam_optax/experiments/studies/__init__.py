"""The studies: a file each, and a line here that enters it into the registry.

To add one, write a file that calls :func:`register` and name it below.
"""

from fsam_optax.experiments.studies import batch_size as batch_size
from fsam_optax.experiments.studies import convergence as convergence
from fsam_optax.experiments.studies import curvature as curvature
from fsam_optax.experiments.studies import decomposition as decomposition
from fsam_optax.experiments.studies import ema as ema
from fsam_optax.experiments.studies import hyperparameters as hyperparameters
from fsam_optax.experiments.studies import label_noise as label_noise
from fsam_optax.experiments.studies import metric as metric
from fsam_optax.experiments.studies import rho as rho
from fsam_optax.experiments.studies.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.studies.registry import Study as Study
from fsam_optax.experiments.studies.registry import register as register

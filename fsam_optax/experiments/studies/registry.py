"""The studies by name. To add one: its file, and its entry below."""

from fsam_optax.experiments.studies import batch_size
from fsam_optax.experiments.studies import convergence
from fsam_optax.experiments.studies import curvature
from fsam_optax.experiments.studies import decomposition
from fsam_optax.experiments.studies import ema
from fsam_optax.experiments.studies import hyperparameters
from fsam_optax.experiments.studies import label_noise
from fsam_optax.experiments.studies import metric
from fsam_optax.experiments.studies import rho
from fsam_optax.experiments.studies.entry import Study

REGISTRY: dict[str, Study] = {
  entry.name: entry
  for entry in (
    batch_size.ENTRY,
    convergence.ENTRY,
    curvature.ENTRY,
    decomposition.ENTRY,
    ema.ENTRY,
    hyperparameters.ENTRY,
    label_noise.ENTRY,
    metric.ENTRY,
    rho.ENTRY,
  )
}

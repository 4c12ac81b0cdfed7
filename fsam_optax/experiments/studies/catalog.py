"""The studies by name. To add one: its file, and its line below."""

from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import batch_size
from fsam_optax.experiments.studies import cheap_forms
from fsam_optax.experiments.studies import cifar
from fsam_optax.experiments.studies import convergence
from fsam_optax.experiments.studies import curvature
from fsam_optax.experiments.studies import decomposition
from fsam_optax.experiments.studies import ema
from fsam_optax.experiments.studies import hyperparameters
from fsam_optax.experiments.studies import label_noise
from fsam_optax.experiments.studies import metric
from fsam_optax.experiments.studies import momentum
from fsam_optax.experiments.studies import replicas
from fsam_optax.experiments.studies import rho

REGISTRY: dict[str, Study] = {
  study.name: study
  for study in (
    batch_size.STUDY,
    cheap_forms.STUDY,
    cifar.STUDY,
    convergence.STUDY,
    curvature.STUDY,
    decomposition.STUDY,
    ema.STUDY,
    hyperparameters.STUDY,
    label_noise.STUDY,
    metric.STUDY,
    momentum.STUDY,
    replicas.STUDY,
    rho.STUDY,
  )
}

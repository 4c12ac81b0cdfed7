"""The studies by name. To add one: its file, and its line below."""

from fsam_optax.experiments.common import registry
from fsam_optax.experiments.lab.study import Study as Study

_FILES = (
  "cheap_forms",
  "cifar",
  "cifar100",
  "convergence",
  "curvature",
  "direction",
  "ema",
  "fine_tuning",
  "hyperparameters",
  "label_noise",
  "metric",
  "momentum",
  "replicas",
  "rho",
)
REGISTRY: dict[str, Study] = registry.of(__name__, _FILES, Study)

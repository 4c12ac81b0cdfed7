"""The studies: a file each, and a line in ``registry``."""

from fsam_optax.experiments.studies.entry import Study as Study
from fsam_optax.experiments.studies.registry import REGISTRY as REGISTRY

"""The studies: a file a question, and a line in ``catalog``."""

from fsam_optax.experiments.lab.study import Study as Study
from fsam_optax.experiments.studies.catalog import REGISTRY as REGISTRY

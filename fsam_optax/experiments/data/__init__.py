"""The data sets: a file each, by name in ``catalog``."""

from fsam_optax.experiments.data.catalog import REGISTRY as REGISTRY
from fsam_optax.experiments.data.catalog import describe as describe
from fsam_optax.experiments.data.catalog import load as load
from fsam_optax.experiments.data.catalog import name_of as name_of
from fsam_optax.experiments.data.images import DataError as DataError
from fsam_optax.experiments.data.images import Images as Images

"""The data sets: a file each, and a line in ``registry``."""

from fsam_optax.experiments.datasets.entry import DataSet as DataSet
from fsam_optax.experiments.datasets.entry import SeedRows as SeedRows
from fsam_optax.experiments.datasets.entry import Sizes as Sizes
from fsam_optax.experiments.datasets.images import DataError as DataError
from fsam_optax.experiments.datasets.images import Images as Images
from fsam_optax.experiments.datasets.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.datasets.registry import describe as describe
from fsam_optax.experiments.datasets.registry import load as load
from fsam_optax.experiments.datasets.registry import name_of as name_of
from fsam_optax.experiments.datasets.registry import register as register

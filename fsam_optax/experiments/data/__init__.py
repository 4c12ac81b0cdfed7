"""The data sets: a file each, and a line in ``registry``."""

from fsam_optax.experiments.data.entry import DataSet as DataSet
from fsam_optax.experiments.data.entry import SeedRows as SeedRows
from fsam_optax.experiments.data.entry import Sizes as Sizes
from fsam_optax.experiments.data.images import DataError as DataError
from fsam_optax.experiments.data.images import Images as Images
from fsam_optax.experiments.data.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.data.registry import describe as describe
from fsam_optax.experiments.data.registry import load as load
from fsam_optax.experiments.data.registry import name_of as name_of
from fsam_optax.experiments.data.registry import register as register

"""The data sets: a file each, and a line here that enters it into the registry.

To add one, write a file that calls :func:`register` and name it below.
"""

from fsam_optax.experiments.datasets import cifar as cifar
from fsam_optax.experiments.datasets import digits as digits
from fsam_optax.experiments.datasets import folder as folder
from fsam_optax.experiments.datasets import mnist as mnist
from fsam_optax.experiments.datasets import npz as npz
from fsam_optax.experiments.datasets.images import DataError as DataError
from fsam_optax.experiments.datasets.images import Images as Images
from fsam_optax.experiments.datasets.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.datasets.registry import DataSet as DataSet
from fsam_optax.experiments.datasets.registry import SeedRows as SeedRows
from fsam_optax.experiments.datasets.registry import Sizes as Sizes
from fsam_optax.experiments.datasets.registry import describe as describe
from fsam_optax.experiments.datasets.registry import load as load
from fsam_optax.experiments.datasets.registry import name_of as name_of
from fsam_optax.experiments.datasets.registry import register as register

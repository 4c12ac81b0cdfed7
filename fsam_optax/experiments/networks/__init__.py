"""The networks: a file each, and a line in ``registry``."""

from fsam_optax.experiments.networks.entry import Network as Network
from fsam_optax.experiments.networks.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.networks.registry import register as register

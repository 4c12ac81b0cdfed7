"""The networks by name. To add one: its file."""

from fsam_optax.experiments.common import registry
from fsam_optax.experiments.networks.entry import Network as Network

REGISTRY: dict[str, Network] = registry.of(__name__, Network)

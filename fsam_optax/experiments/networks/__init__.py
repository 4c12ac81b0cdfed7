"""The networks by name. To add one: its file, and its line below."""

from fsam_optax.experiments.common import registry
from fsam_optax.experiments.networks.entry import Network as Network

_FILES = (
  "cnn",
  "mlp",
  "resnet",
  "vgg",
  "wide_resnet",
)
REGISTRY: dict[str, Network] = registry.of(__name__, _FILES, Network)

"""The networks by name. To add one: its file, and its entry below."""

from fsam_optax.experiments.networks import cnn
from fsam_optax.experiments.networks import mlp
from fsam_optax.experiments.networks import resnet
from fsam_optax.experiments.networks import vgg
from fsam_optax.experiments.networks import wide_resnet
from fsam_optax.experiments.networks.entry import Network

REGISTRY: dict[str, Network] = {
  entry.name: entry
  for entry in (
    cnn.ENTRY,
    mlp.ENTRY,
    resnet.ENTRY,
    vgg.ENTRY,
    wide_resnet.ENTRY,
  )
}


def register(network: Network) -> Network:
  """Enters a network into :data:`REGISTRY`, under its name.

  Args:
    network: what its file declares.

  Returns:
    The same.
  """
  REGISTRY[network.name] = network
  return network

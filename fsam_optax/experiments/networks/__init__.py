"""The networks: a file each, and a line here that enters it into the registry.

To add one, write a file that calls :func:`register` and name it below.
"""

from fsam_optax.experiments.networks import cnn as cnn
from fsam_optax.experiments.networks import mlp as mlp
from fsam_optax.experiments.networks import resnet as resnet
from fsam_optax.experiments.networks import vgg as vgg
from fsam_optax.experiments.networks import wide_resnet as wide_resnet
from fsam_optax.experiments.networks.registry import REGISTRY as REGISTRY
from fsam_optax.experiments.networks.registry import Network as Network
from fsam_optax.experiments.networks.registry import register as register

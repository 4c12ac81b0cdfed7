"""How the authors train CIFAR: four recipes, each a data set and a network."""

from typing import NamedTuple


class Recipe(NamedTuple):
  """A data set and a network: what the flags leave open.

  The defaults of the other flags are the same for all recipes.

  Attributes:
    dataset: name in :mod:`fsam_optax.experiments.data`.
    model: name in :mod:`fsam_optax.experiments.networks`, of which depth and
      width are the usual ones.
  """

  dataset: str
  model: str


# The authors publish a script for the first alone, in which they name the other
# two networks (https://github.com/nblt/F-SAM, run.sh and train.py). Its numbers
# are those of all four.
RECIPES = {
  "cifar100-resnet18": Recipe("cifar100", "resnet"),
  "cifar10-resnet18": Recipe("cifar10", "resnet"),
  "cifar100-vgg16bn": Recipe("cifar100", "vgg"),
  "cifar100-wrn28x10": Recipe("cifar100", "wide_resnet"),
}

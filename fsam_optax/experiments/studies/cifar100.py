"""The study on CIFAR-100: what is an ascent worth to a ResNet?

ResNet-10 with a quarter of the channels learns 5,000 images of CIFAR-100 at
16 x 16 pixels, each arm after a search as in the study ``cifar``.
"""

from flax import linen as nn

from fsam_optax.experiments import networks
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.studies import cheap_forms
from fsam_optax.experiments.studies import cifar


def network(classes: int) -> nn.Module:
  """ResNet-10 of width 16, 0.3 million parameters."""
  return networks.REGISTRY["resnet"].create(classes, depth=10, width=16)


def _setting(title: str, seed: int) -> study.Setting:
  return study.Setting(
    title,
    "cifar100",
    "resnet-10 of width 16",
    0.0,
    best={
      "sgd": Point(0.071, 0.0, 0.005),
      "sam": Point(0.071, 0.035, 0.005),
      "fsam": Point(0.071, 0.035, 0.005),
    },
    changes=cifar.CHANGES
    | {
      "network": network,
      # XLA's convolutions take a hundred times as long in a loop of XLA.
      "trainer_options": {"augment": cifar.flip, "scan": False},
      **study.searched_by(range(seed, seed + 3), first=1),
    },
    images=lambda lab: {"pool": cifar.load(lab.sources, "cifar100", 5000, 16)},
  )


SETTINGS = [
  _setting("CIFAR-100 at 16 x 16", 0),
  _setting("a second search", 3),
]
STUDY = study.Study(
  "cifar100",
  "what is an ascent worth to a ResNet?",
  cheap_forms.some("SGD", "random direction", "SAM", "F-SAM"),
  settings=SETTINGS,
  seeds=8,
  first_seed=1000,
)

"""The study of fine-tuning: what is an ascent worth from pretrained weights?

The convolutions of the study ``cifar`` learn 45,000 images of CIFAR-100 by SGD.
Each arm then trains them on, with a new last layer, on 1,000 of CIFAR-10.
"""

import dataclasses
import functools
from typing import Any, Optional

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import splits
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab import trainer
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.studies import cheap_forms
from fsam_optax.experiments.studies import cifar

_PRETRAINING, _EPOCHS, _LEARNING_RATE, _WEIGHT_DECAY = 45_000, 20, 0.1, 5e-4


@dataclasses.dataclass(frozen=True)
class Setting(cifar.Setting):
  """With weights to begin with."""

  def at(self, lab: Lab) -> Lab:
    begin = functools.partial(
      begin_at,
      source=lab.sources["cifar100"],
      epochs=1 if lab.is_quick else _EPOCHS,
    )
    options = {"augment": cifar.flip, "begin": begin}
    return super().at(lab).at(trainer_options=options)


def begin_at(
  variables: dict[str, Any], source: Optional[str], epochs: int
) -> dict[str, Any]:
  """The variables of runs with pretrained weights, but for the last layer."""
  pretrained = _pretrained(source, epochs)
  # The last layer has another number of classes, and so another shape.
  params = jax.tree.map(
    lambda own, x: (
      jnp.broadcast_to(x, own.shape) if own.shape[1:] == x.shape else own
    ),
    variables["params"],
    pretrained,
  )
  return {**variables, "params": params}


@functools.cache
def _pretrained(source: Optional[str], epochs: int) -> Any:
  pool = cifar.load(source, "cifar100", _PRETRAINING)
  train = trainer.Trainer(
    cifar.network(pool.classes),
    pool,
    {"SGD": arms.SGD},
    epochs=epochs,
    batch_size=cifar.BATCH_SIZE,
    augment=cifar.flip,
  )
  values = np.array([[_LEARNING_RATE], [0.0], [_WEIGHT_DECAY]])
  outcome = train("SGD", splits.split(pool, [0], 0.0), *values)
  (accuracy,) = outcome.validation_accuracy
  print(f"pretraining: {accuracy:.2f} % of the validation rows of CIFAR-100")
  return jax.tree.map(lambda x: x[0], outcome.params)


def _setting(title: str, seed: int) -> Setting:
  return Setting(
    title,
    "cifar10",
    "three convolutions, pretrained",
    0.0,
    best={
      "sgd": Point(0.02, 0.0, 0.04),
      "sam": Point(0.02, 0.1, 0.04),
      "fsam": Point(0.02, 0.1, 0.04),
    },
    changes=study.searched_by(range(seed, seed + 8), first=2),
    train_size=1000,
  )


SETTINGS = [
  _setting("1,000 images of CIFAR-10", 0),
  _setting("a second search", 8),
  _setting("a third search", 16),
]
STUDY = study.Study(
  "fine-tuning",
  "what is an ascent worth from pretrained weights?",
  cheap_forms.some(
    *("SGD", "random direction", "SAM", "F-SAM"), cheap_forms.MOMENTUM
  ),
  settings=SETTINGS,
  seeds=32,
  first_seed=1000,
)

"""The study of fine-tuning: what is an ascent worth from pretrained weights?

The convolutions of the study ``cifar`` learn 45,000 images of CIFAR-100 by SGD.
Each arm then trains them on, with a new last layer, on 1,000 of CIFAR-10.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.studies import cheap_forms
from fsam_optax.experiments.studies import cifar

_PRETRAINING, _POINT = 45_000, Point(0.1, 0.0, 5e-4)


def _images(lab: Lab, seed: int) -> dict[str, Any]:
  """Those to fine-tune on, and the weights of a run of this seed on the others.

  The store keeps the weights: another machine rounds differently, and so would
  not find them again.
  """
  images = cifar.load(lab.sources, "cifar10", 1000)
  pool = cifar.load(lab.sources, "cifar100", _PRETRAINING)
  before = lab.at(pool=pool, arms={"SGD": arms.SGD}, described={})
  measure = functools.partial(weights_of, classes=pool.classes)
  row = before.run("SGD", _POINT, [seed], "weights", measure=measure)
  (accuracy,) = row["validation_accuracy"]
  print(f"pretraining: {accuracy:.2f} % of the validation rows of CIFAR-100")
  begin = functools.partial(begin_at, pretrained=row["measures"])
  return {
    "pool": images,
    "trainer_options": {**lab.trainer_options, "begin": begin},
  }


def weights_of(model: Any, key: jax.Array, classes: int) -> dict[str, Any]:
  """The weights of a run by their paths, but for the last layer's."""
  del key
  _, params, _ = model
  return {
    # Nine digits are a float32.
    jax.tree_util.keystr(path): np.char.mod("%.9g", x).astype(float).tolist()
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if x.shape[-1] != classes
  }


def begin_at(
  variables: dict[str, Any], pretrained: dict[str, Any]
) -> dict[str, Any]:
  """The variables of runs with the weights that a row has in place of own."""

  def begin(path, own):
    weights = left.pop(jax.tree_util.keystr(path), own)
    return jnp.broadcast_to(jnp.asarray(weights, own.dtype), own.shape)

  left = dict(pretrained)
  params = jax.tree_util.tree_map_with_path(begin, variables["params"])
  if left or not pretrained:  # It diverged, or is of another network.
    raise ValueError(f"no parameters for the weights {sorted(left)}")
  return {**variables, "params": params}


def _setting(title: str, seed: int) -> study.Setting:
  return study.Setting(
    title,
    "cifar10",
    "three convolutions, pretrained",
    0.0,
    best={
      "sgd": Point(0.02, 0.0, 0.04),
      "sam": Point(0.02, 0.1, 0.04),
      "fsam": Point(0.02, 0.1, 0.04),
    },
    changes=cifar.CHANGES | study.searched_by(range(seed, seed + 8), first=2),
    images=functools.partial(_images, seed=seed),
  )


SETTINGS = [
  _setting("1,000 images of CIFAR-10", 0),
  _setting("other weights, a second search", 8),
  _setting("other weights, a third search", 16),
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

"""The study on CIFAR-10: F-SAM on real images with a convolutional network.

Three convolutions with BatchNorm on 5,000 images, half of them mirrored. Each
arm gets the same search: 27 points by one seed, which go on where the best is
at an end, then the best three by two more, on validation rows. Its accuracy is
that of 16 other seeds, on all test rows, which are looked at once.
"""

from typing import Any, Mapping, Optional
import zlib

import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.lab import splits as splits_lib
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.networks.cnn import CNN
from fsam_optax.experiments.studies import ascents
from fsam_optax.experiments.studies import cheap_forms

_VALIDATION = 5000
# Random streams of a seed; that of the batches is the trainer's.
_SPLIT_STREAM, _FLIP_STREAM = 19, 2**31


def network(classes: int) -> CNN:
  """Three convolutions with BatchNorm."""
  return CNN(classes, (16, 32, 64), norm="batch")


def flip(seed: jax.Array, step: jax.Array, x: jax.Array) -> jax.Array:
  """Mirrors half of the images, left to right."""
  _, key = jax.random.split(jax.random.key(seed))
  key = jax.random.fold_in(jax.random.fold_in(key, _FLIP_STREAM), step)
  drawn = augmentation.draw(augmentation.Augmentation(), key, x.shape)
  return jnp.where(drawn.is_flipped[:, None, None, None], x[:, :, ::-1], x)


def load(
  sources: Mapping[str, Optional[str]],
  name: str,
  train: int,
  image_size: Optional[int] = None,
) -> splits_lib.Pool:
  """The images of CIFAR-10 or of CIFAR-100, as bytes where they keep a size.

  So many of those that the command was given are to train on.
  """
  source, flag = sources[name], f"--{name}"
  if source is None:
    raise FlagError(flag, "must be given: images to train on, got none")
  try:
    images = data.load(source, otherwise=name, image_size=image_size)
  except data.DataError as error:
    raise FlagError(flag, error) from error
  moments = images.mean, images.standard_deviation
  if images.name != name or None in moments:
    raise FlagError(
      flag, f"must hold the published files of {name}, got {source!r}"
    )
  x = np.concatenate([images.x_train, images.x_test])
  return splits_lib.Pool(
    name,
    x,
    np.concatenate([images.y_train, images.y_test]),
    images.classes,
    train,
    _VALIDATION,
    len(images.y_test),
    fixed_test=True,
    stream=(_SPLIT_STREAM,),
    scale=(
      255 * np.asarray(images.mean, np.float32),
      255 * np.asarray(images.standard_deviation, np.float32),
    ),
    fingerprint=f"{zlib.crc32(x.tobytes()):08x}",
  )


CHANGES: dict[str, Any] = {
  "network": network,
  "epochs": 20,
  "batch_size": 128,
  "trainer_options": {"augment": flip},
  "at_once": 1,  # Its arrays fill a processor's cache.
}


def _setting(
  title: str, noise: float, rate: float, sam: float, fsam: float, seed: int = 0
) -> study.Setting:
  return study.Setting(
    title,
    "cifar10",
    "three convolutions",
    noise,
    best={
      "sgd": Point(rate, 0.0, 0.02),
      "sam": Point(0.04, sam, 0.02),
      "fsam": Point(0.04, fsam, 0.02),
    },
    changes=CHANGES | study.searched_by(range(seed, seed + 3), first=1),
    images=lambda lab: {"pool": load(lab.sources, "cifar10", 5000)},
  )


_WRONG, _RIGHT = (0.4, 0.056, 0.024, 0.05), (0.0, 0.04, 0.017, 0.017)
SETTINGS = [
  _setting("CIFAR-10, 40 % wrong", *_WRONG),
  _setting("CIFAR-10, 0 % wrong", *_RIGHT),
  # The errors leave out the chance of a search, so it is repeated.
  _setting("40 % wrong, a second search", *_WRONG, seed=3),
  _setting("40 % wrong, a third search", *_WRONG, seed=6),
  _setting("0 % wrong, a second search", *_RIGHT, seed=3),
]
_EIGHTH = cheap_forms.fraction(1 / 8)
_ARMS = cheap_forms.some(
  *("SGD", "SAM", "F-SAM", cheap_forms.MOMENTUM, "random direction"),
  "at long gradients (AE-SAM)",
) | {
  '1/8 of the rows, `ema_gradient="descent"`': _EIGHTH,
  "1/8, normalized by the whole batch": _EIGHTH._replace(
    make_step=ascents.step_by_all_statistics, gradients=2
  ),
}
STUDY = study.Study(
  "cifar",
  "does F-SAM beat SAM with convolutions on real images?",
  _ARMS,
  settings=SETTINGS,
  seeds=16,
  first_seed=1000,
)

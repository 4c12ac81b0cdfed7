"""The study on CIFAR: F-SAM on real images with a convolutional network.

SGD, SAM, F-SAM and cheaper forms with BatchNorm on 5,000 images, half of them
mirrored, at a setting's fraction of wrong labels. Each form gets the same
search for its learning rate and its radius, on validation rows: twelve points
by one seed, continued where the best is at an end, then the best three by two
more. Its accuracy is that of 16 other seeds, on all test rows, which are looked
at once. In two settings the same for SAM and F-SAM at eight radii.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import splits as splits_lib
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.store import Row
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.networks import layers
from fsam_optax.experiments.studies import cheap_forms
from fsam_optax.experiments.studies import rho

_TRAIN, _VALIDATION, _EPOCHS, _BATCH_SIZE = 5000, 5000, 20, 128
_WEIGHT_DECAY = 5e-4
# Random streams of a seed; that of the batches is the trainer's.
_SPLIT_STREAM, _FLIP_STREAM = 19, 2**31
_CURVE_SEEDS = 4
_CURVE = tuple(0.025 * 2**i for i in range(8))  # 0.025 to 3.2.
_SGD_RATES = tuple(0.01 * 1.4**i for i in range(12))  # 0.01 to 0.4.
_RADII = (0.05, 0.1, 0.2, 0.4)  # Times the unit of the form.
_RATES = (0.025, 0.05, 0.1)


class Setting(NamedTuple):
  """What is trained on, and by which forms.

  Attributes:
    dataset: ``"cifar10"`` or ``"cifar100"``.
    label_noise: fraction of wrong training labels, in ``[0, 1)``.
    arms: by their names.
    has_curve: whether SAM and F-SAM are trained over the radius, too.
  """

  dataset: str
  label_noise: float
  arms: tuple[str, ...]
  has_curve: bool


_EIGHTH = cheap_forms.EIGHTH
_MAIN = ("F-SAM", "SAM", "SGD", _EIGHTH, "random direction")
_CHEAP = ("F-SAM, 1/2", "F-SAM, at long gradients", "along the momentum")
_SETTINGS = (
  Setting("cifar10", 0.4, _MAIN + _CHEAP, has_curve=True),
  Setting("cifar10", 0.0, _MAIN, has_curve=False),
  Setting("cifar100", 0.0, _MAIN, has_curve=True),
  Setting("cifar10", 0.2, _MAIN, has_curve=False),
)


def _searched(name: str) -> Any:
  arm = cheap_forms.ARMS[name]
  if arm.perturbation is None:
    return arm._replace(rates=_SGD_RATES)
  unit = round(arm.radii[0] / cheap_forms.ARMS["F-SAM"].radii[0], 6)
  return arm._replace(rates=_RATES, radii=tuple(unit * x for x in _RADII))


_ARMS = {name: _searched(name) for name in _MAIN + _CHEAP}


class Network(nn.Module):
  """Three convolutions of stride 2 with BatchNorm, then a linear layer.

  With 10 classes 33,946 parameters.
  """

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, 32, 32, 3]` to logits `[B, classes]`."""
    norm = layers.batch_norm(train, None)
    for channels in (16, 32, 64):
      x = nn.Conv(channels, (3, 3), 2, padding=1, use_bias=False)(x)
      x = nn.relu(norm()(x))
    return nn.Dense(self.classes)(x.reshape(len(x), -1))


def _flip(seed: jax.Array, step: jax.Array, x: jax.Array) -> jax.Array:
  """Mirrors half of the images, left to right."""
  _, key = jax.random.split(jax.random.key(seed))
  key = jax.random.fold_in(jax.random.fold_in(key, _FLIP_STREAM), step)
  # The first of the four keys of an augmentation of `train`.
  is_flipped = jax.random.bernoulli(jax.random.split(key, 4)[0], 0.5, (len(x),))
  return jnp.where(is_flipped[:, None, None, None], x[:, :, ::-1], x)


def load(dataset: str, source: str) -> splits_lib.Pool:
  """The images of CIFAR as bytes, which no seed copies."""
  try:
    images = data.load(source, otherwise=dataset)
  except data.DataError as error:
    raise FlagError(f"--{dataset}", error) from error
  if images.mean is None or images.standard_deviation is None:
    raise FlagError(
      f"--{dataset}", f"must hold the published files of CIFAR, got {source!r}"
    )
  return splits_lib.Pool(
    dataset,
    np.concatenate([images.x_train, images.x_test]),
    np.concatenate([images.y_train, images.y_test]),
    images.classes,
    _TRAIN,
    _VALIDATION,
    len(images.y_test),
    fixed_test=True,
    stream=(_SPLIT_STREAM,),
    scale=(
      255 * np.asarray(images.mean, np.float32),
      255 * np.asarray(images.standard_deviation, np.float32),
    ),
  )


def _run(lab: Lab) -> dict[str, Any]:
  pools = {
    dataset: load(dataset, source)
    for dataset, source in lab.sources.items()
    if source is not None
  }
  if not pools and not lab.store.rows:
    raise FlagError(
      "--cifar10", "must be given, or --cifar100: images to train on, got none"
    )
  for setting in _SETTINGS:
    if setting.dataset in pools:
      _train(lab, setting, pools[setting.dataset])
  config = {
    "dataset": "CIFAR",
    "model": "three convolutions",
    "label_noise": [setting.label_noise for setting in _SETTINGS],
    "train_size": _TRAIN,
    "validation_size": _VALIDATION,
    "epochs": _EPOCHS,
    "batch_size": _BATCH_SIZE,
  }
  return report(lab.store.rows) | {"config": config}


def at(lab: Lab, pool: splits_lib.Pool, label_noise: float) -> Lab:
  """The laboratory with the network and the images of this study."""
  return lab.at(
    pool=pool,
    model="three convolutions",
    network=Network,
    label_noise=label_noise,
    label_noise_kind="symmetric",
    epochs=1 if lab.is_quick else _EPOCHS,
    batch_size=_BATCH_SIZE,
    search_seeds=[0],
    more_seeds=[1, 2],
    # In a loop of XLA's, a CPU takes 24 times as long for a convolution.
    trainer_options={"is_loop": True, "augment": _flip},
  )


def _train(lab: Lab, setting: Setting, pool: splits_lib.Pool) -> None:
  """Searches and tests the forms of a setting, and trains its curve."""
  lab = at(lab, pool, setting.label_noise)
  for name in setting.arms:
    if name in lab.chosen:
      lab.test(name)
  for name in ("SAM", "F-SAM") if setting.has_curve else ():
    if name in lab.chosen:
      rate = lab.test(name)["learning_rate"]
      seeds = lab.seeds[:_CURVE_SEEDS]
      for radius in _CURVE[:1] if lab.is_quick else _CURVE:
        lab.run(name, Point(rate, radius, _WEIGHT_DECAY), seeds, "radius")


_PAIRS = (  # Of forms whose differences are shown for all settings at once.
  ("SAM", "SGD"),
  ("F-SAM", "SAM"),
  ("F-SAM", "random direction"),
  (_EIGHTH, "F-SAM"),
)


def report(rows: Sequence[Row]) -> dict[str, Any]:
  """Tables and panels of what was trained."""
  tables, panels, summary = [], [], []
  for setting in _SETTINGS:
    of = [
      row for row in rows if (row["dataset"], row["label_noise"]) == setting[:2]
    ]
    tests = {row["arm"]: row for row in of if row["phase"] == "test"}
    curves: dict[str, dict[float, Any]] = {"SAM": {}, "F-SAM": {}}
    for row in of:
      if row["phase"] == "radius":
        curves[row["arm"]][row["rho"]] = row["test_accuracy"]
    title = f"{setting.dataset}, {setting.label_noise:.0%} wrong labels"
    if tests:
      table = paired_report.arms_table(tests, ("SGD", "SAM", "F-SAM"), "form")
      tables.append({"title": title} | table)
      summary.append([title, *(_over(tests, *pair) for pair in _PAIRS)])
    if curves["SAM"] and curves["F-SAM"]:
      found = rho.over_the_radius(curves)
      (table,), (panel,) = found["tables"], found["panels"]
      tables.append({"title": f"{title}, over rho"} | table)
      panels.append(panel | {"title": title, "is_log": True})
  header = ["setting", *(f"{one} over {other}" for one, other in _PAIRS)]
  tables.append({"title": "all settings", "header": header, "rows": summary})
  return {"tables": tables, "panels": panels}


def _over(tests: dict[str, Row], one: str, other: str) -> Any:
  """What one form has over another; empty where one of the two is missing."""
  if not {one, other} <= tests.keys():
    return ""
  pair = (tests[name]["test_accuracy"] for name in (one, other))
  return paired_report.over(*pair)


STUDY = Study(
  "cifar",
  "does F-SAM beat SAM with convolutions on real images?",
  _run,
  _ARMS,
  seeds=16,
  first_seed=1000,
)

"""A program of ``train`` that is compiled in seconds, and what it runs on."""

import dataclasses

from meshes import make_mesh
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.train.flag_checks import config_of
from fsam_optax.experiments.train.flags_and_recipes import Settings
from fsam_optax.experiments.train.program import Program

# That with the fewest layers to compile.
DEFAULTS = {
  "model": "wide_resnet",
  "depth": 10,
  "width": 1,
  "epochs": 2,
  "batch_size": 16,
  "crop_padding": 1,
  "cutout": 3,
}
MEAN, STANDARD_DEVIATION = 0.4914, 0.2023


def settings_of(**flags):
  """Settings with these values, by the names of the fields of any group."""
  settings = Settings()
  for group in ("ascent", "descent", "network", "images"):
    value = getattr(settings, group)
    names = {field.name for field in dataclasses.fields(value)}
    changes = {name: flags.pop(name) for name in names & flags.keys()}
    value = dataclasses.replace(value, **changes)
    settings = dataclasses.replace(settings, **{group: value})
  return dataclasses.replace(settings, **flags)


def images_of(rows=48, size=8):
  """Noise of ten classes, three batches of it."""
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
  y = rng.integers(0, 10, rows).astype(np.int32)
  return data.Images(
    *("noise", x, y, x[:20], y[:20], 10),
    mean=(MEAN,),
    standard_deviation=(STANDARD_DEVIATION,),
  )


def program_of(*, devices=1, images=None, **changes):
  """Three steps an epoch on noise of 8 x 8, or on other images."""
  images = images or images_of()
  config = config_of(settings_of(**{**DEFAULTS, **changes}), images)
  return Program(config, images, make_mesh(batch=devices))

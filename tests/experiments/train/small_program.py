"""A program of ``train`` that is compiled in seconds, and what it runs on."""

import dataclasses

import jax
import numpy as np
from numpy_augmentation import MEAN
from numpy_augmentation import STANDARD_DEVIATION

from fsam_optax.experiments import networks
from fsam_optax.experiments.train import program
from fsam_optax.experiments.train.config import Config

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


def config_of(**flags):
  """A configuration with these values, by the names of the fields."""
  config = Config()
  for group in dataclasses.fields(config):
    value = getattr(config, group.name)
    names = {field.name for field in dataclasses.fields(value)}
    changes = {name: flags.pop(name) for name in names & flags.keys()}
    value = dataclasses.replace(value, **changes)
    config = dataclasses.replace(config, **{group.name: value})
  assert not flags
  return config


def program_of(mesh, *, size=8, **changes):
  """Three steps an epoch on images of 8 x 8."""
  config = config_of(**{**DEFAULTS, **changes})
  return program.Program(
    config,
    program.Shapes((size, size, 3), np.dtype(np.uint8), 10, 3, 0),
    mesh,
    mean=MEAN[0],
    standard_deviation=STANDARD_DEVIATION[0],
  )


def network_of(name, classes, **options):
  return networks.REGISTRY[name].create(classes, **options)


def mesh_of(number):
  return jax.make_mesh(
    (number,),
    ("batch",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:number],
  )


def images_of(number):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
  return x, rng.integers(0, 10, number).astype(np.int32)

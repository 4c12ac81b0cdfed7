"""Meshes of the eight CPU devices."""

import math

import jax


def make_mesh(kind="Auto", **sizes):
  """A mesh of axes by name, by default all devices along "batch".

  Along axes of the kind "Auto" the compiler chooses the shardings; along
  "Explicit" ones they are in the types.
  """
  sizes = sizes or {"batch": 8}
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    devices=jax.devices()[: math.prod(sizes.values())],
    axis_types=(getattr(jax.sharding.AxisType, kind),) * len(sizes),
  )

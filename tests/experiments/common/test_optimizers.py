"""The optimizers by name are those of the library."""

import chex
import jax
from jax import numpy as jnp
import pytest

import fsam_optax
from fsam_optax.experiments.common import optimizers

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array([0.5])}
GRADIENT = {"w": jnp.array([0.3, 0.1]), "b": jnp.array([-0.2])}


def ascend(perturbation):
  state = perturbation.init(PARAMS)
  for _ in range(2):
    epsilon, state = perturbation.update(
      jax.tree.map(jnp.sin, GRADIENT), state, PARAMS
    )
  return epsilon


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    (
      "sam",
      {"rho": 0.2, "adaptive": True, "eta": 0.1},
      fsam_optax.sam_perturbation(0.2, adaptive=True, eta=0.1),
    ),
    (
      "fsam",
      {"rho": 0.2, "sigma": 0.5, "lmbda": 0.8, "order": "paper"},
      fsam_optax.friendly_perturbation(0.2, 0.5, 0.8, order="paper"),
    ),
  ],
)
def test_ascent_is_that_of_the_library(name, options, expected):
  found = optimizers.perturbation(name, **options)
  chex.assert_trees_all_equal(ascend(found), ascend(expected))


def test_sgd_has_no_ascent():
  assert optimizers.perturbation("sgd", rho=0.1) is None
  assert optimizers.ASCENDING == ("sam", "fsam")
  assert optimizers.label("fsam") == "F-SAM"

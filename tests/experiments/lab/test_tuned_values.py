"""The defaults of the commands, and the grids they were chosen from."""

import itertools
import math

import pytest

from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.lab import tuned_values


@pytest.mark.parametrize("dataset", ["mnist", "digits", "my.npz"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_defaults_lie_inside_grids_of_as_many_points_for_each(dataset, model):
  recipe = tuned_values.recipe(dataset, model)
  for optimizer, best in recipe.best.items():
    grid = recipe.grid(optimizer)
    assert len(grid.points()) == 64
    for value, values in zip(best, grid, strict=True):
      assert value in (values[1:-1] if value else (0.0,))
      assert list(values) == sorted(set(values))
      ratios = [b / a for a, b in itertools.pairwise(values)]
      step = 2 if recipe.of else math.sqrt(2)
      assert ratios == pytest.approx([step] * len(ratios), rel=0.05)


def test_another_image_size_says_that_nothing_was_tuned_for_it():
  assert "tuned on validation" in tuned_values.recipe("mnist", "mlp", 14).origin
  assert "tuned on validation" in tuned_values.recipe("digits", "mlp", 8).origin
  origin = tuned_values.recipe("digits", "mlp", 4).origin
  assert origin == "not tuned for these images: those of digits at 8 x 8"
  assert tuned_values.recipe("mnist", "mlp", 28).image_size == 28


def test_an_optimizer_without_values_of_its_own_takes_those_of_its_kin(
  monkeypatch,
):
  monkeypatch.setattr(optimizers, "ASCENDING", ("sam", "fsam", "mine"))
  recipe = tuned_values.recipe("digits", "mlp")
  assert recipe.point("mine") == recipe.point("fsam") != recipe.point("sam")
  assert recipe.point("lion") == recipe.point("sgd")
  assert len(recipe.grid("mine").points()) == 64

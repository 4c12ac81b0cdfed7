"""The defaults of the commands, and the grids they were chosen from."""

import pytest

from fsam_optax.experiments.seeds import recipes


@pytest.mark.parametrize("dataset", ["mnist", "digits", "my.npz"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_default_values_lie_inside_the_grids_they_were_chosen_from(
  dataset, model
):
  recipe = recipes.recipe(dataset, model)
  for values, grids in (
    (recipe.learning_rate, recipe.learning_rate_grid),
    (recipe.rho, recipe.rho_grid),
  ):
    for optimizer, value in values.items():
      assert value in grids[optimizer][1:-1]


def test_only_the_digits_of_mnist_are_made_smaller():
  assert recipes.recipe("mnist", "mlp").image_size == 14
  assert recipes.recipe("digits", "cnn").image_size is None
  assert recipes.recipe("my.npz", "mlp").image_size is None


def test_another_image_size_says_that_nothing_was_tuned_for_it():
  assert "tuned on validation" in recipes.recipe("mnist", "mlp", 14).origin
  assert "not tuned" in recipes.recipe("mnist", "mlp", 28).origin
  assert recipes.recipe("mnist", "mlp", 28).image_size == 28

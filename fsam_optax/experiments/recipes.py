"""The defaults of every data set and model, and how they were chosen."""

from typing import NamedTuple


class Recipe(NamedTuple):
  """What the commands do where no flag says otherwise.

  Attributes:
    epochs: passes over the training rows.
    batch_size: rows a step.
    seeds: number of seeds of ``compare``.
    learning_rate: of each optimizer.
    rho: radius of each optimizer that has one.
    learning_rate_grid: what ``tune`` tries for each optimizer.
    rho_grid: what ``tune`` tries for each optimizer that has a radius.
    origin: one line on where learning rates and radii come from.
  """

  epochs: int
  batch_size: int
  seeds: int
  learning_rate: dict[str, float]
  rho: dict[str, float]
  learning_rate_grid: dict[str, tuple[float, ...]]
  rho_grid: dict[str, tuple[float, ...]]
  origin: str


LABEL_NOISE = 0.4
FIRST_SEED = 200  # Apart from the seeds that `tune` chooses by.
TUNING_SEEDS = 16
TUNING_FIRST_SEED = 0

_MNIST_MLP = Recipe(
  epochs=60,
  batch_size=100,
  seeds=64,
  learning_rate={"sgd": 0.004, "sam": 0.015, "fsam": 0.02},
  rho={"sam": 0.35, "fsam": 0.5},
  learning_rate_grid={
    "sgd": (0.001, 0.002, 0.003, 0.004, 0.006, 0.01),
    "sam": (0.0075, 0.01, 0.015, 0.02, 0.03),
    "fsam": (0.0075, 0.01, 0.015, 0.02, 0.03),
  },
  rho_grid={
    "sam": (0.25, 0.3, 0.35, 0.4, 0.45),
    "fsam": (0.35, 0.4, 0.5, 0.6, 0.7),
  },
  origin="tuned on validation rows at label noise 0.4",
)
_RECIPES: dict[tuple[str, str], Recipe] = {
  ("mnist", "mlp"): _MNIST_MLP,
  ("mnist", "cnn"): _MNIST_MLP._replace(
    seeds=16,
  ),
  ("digits", "mlp"): _MNIST_MLP._replace(
    epochs=100,
    learning_rate={"sgd": 0.003, "sam": 0.03, "fsam": 0.02},
    rho={"sam": 0.6, "fsam": 0.7},
    learning_rate_grid={
      "sgd": (0.001, 0.002, 0.003, 0.004, 0.006, 0.01),
      "sam": (0.01, 0.015, 0.02, 0.03, 0.045),
      "fsam": (0.01, 0.015, 0.02, 0.03, 0.045),
    },
    rho_grid={
      "sam": (0.4, 0.5, 0.6, 0.7, 0.8),
      "fsam": (0.5, 0.6, 0.7, 0.85, 1.0),
    },
  ),
  ("digits", "cnn"): _MNIST_MLP._replace(
    seeds=16,
    epochs=100,
  ),
}


def recipe(dataset: str, model: str) -> Recipe:
  """The recipe of a data set and a model.

  Args:
    dataset: a name, or the path of an ``.npz``, for which nothing is tuned and
      the values are those of the MNIST digits with fewer seeds.
    model: ``"mlp"`` or ``"cnn"``.

  Returns:
    The recipe.
  """
  if (dataset, model) in _RECIPES:
    return _RECIPES[dataset, model]
  return _RECIPES["mnist", model]._replace(
    seeds=16,
    origin="not tuned for this file: those of mnist",
  )

"""The recipes: the networks and the learning rate of the authors' script."""

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from small_program import config_of
from small_program import network_of

from fsam_optax.experiments.train import optimizer
from fsam_optax.experiments.train import recipes


def test_learning_rate_is_the_cosine_of_the_authors():
  config = config_of()
  steps = config.descent.epochs * 391
  rate = jax.jit(optimizer.learning_rate(config, steps))
  at = np.array([0, 1, 390, 391, 39_099, 78_199, 78_200])
  expected = 0.05 * 0.5 * (1 + np.cos(at / steps * np.pi))
  np.testing.assert_allclose(rate(at), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
  ("recipe", "count"),
  [
    ("cifar10-resnet18", 11_173_962),
    ("cifar100-resnet18", 11_220_132),
    ("cifar100-vgg16bn", 15_299_748),
    ("cifar100-wrn28x10", 36_536_884),
  ],
)
def test_parameters_are_those_of_the_standard_network(recipe, count):
  dataset, model, *_ = recipes.RECIPES[recipe]
  network = network_of(model, int(dataset.removeprefix("cifar")))
  variables = jax.eval_shape(
    lambda: network.init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
    )
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == count


def test_initialization_is_that_of_the_authors_framework():
  network = network_of("resnet", 10, width=16, depth=10)
  params = jax.jit(lambda: network.init(
    jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
  )["params"])()  # fmt: skip
  kernel = np.asarray(params["Conv_4"]["kernel"])
  # Uniform between plus and minus one over the root of the inputs.
  bound = 1 / np.prod(kernel.shape[:-1]) ** 0.5
  assert 0.98 * bound < abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)


def test_an_ascent_takes_every_option():
  params = {"Conv": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
  perturbation = optimizer.perturbation(
    config_of(
      mask="exclude_biases_and_norms",
      order="paper",
      accumulator_dtype="bfloat16",
      rho=0.5,
    )
  )
  state = perturbation.init(params)
  averages = [x for x in jax.tree.leaves(state) if x.shape == (2, 2)]
  assert [x.dtype for x in averages] == [jnp.bfloat16]
  assert not [x for x in jax.tree.leaves(state) if x.shape == (2,)]
  epsilon, _ = perturbation.update(params, state, params)
  np.testing.assert_array_equal(epsilon["Conv"]["bias"], 0)
  np.testing.assert_allclose(epsilon["Conv"]["kernel"], 0.25, rtol=1e-2)
  assert optimizer.perturbation(config_of(optimizer="sgd")) is None

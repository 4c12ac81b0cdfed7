"""Each entry of the networks does what it declares."""

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np
import pytest

from fsam_optax.experiments import networks
from fsam_optax.experiments.networks import layers

SMALL = {
  "mlp": {"depth": 2, "width": 4},
  "cnn": {"depth": 2, "width": 4},
  "resnet": {"depth": 10, "width": 4},
  "vgg": {"depth": 11, "width": 4},
  "wide_resnet": {"depth": 10, "width": 1},
}


@pytest.mark.parametrize("name", networks.REGISTRY)
def test_an_entry_builds_what_it_declares(name):
  network = networks.REGISTRY[name]
  assert network.name == name
  module = network.create(7, **SMALL[name])
  side = max(8, network.least_image)
  images = jnp.zeros((2, side, side, 3))
  logits, variables = jax.eval_shape(
    lambda: module.init_with_output(jax.random.key(0), images)
  )
  assert ("batch_stats" in variables) == network.has_statistics
  assert logits.shape == (2, 7)
  assert logits.dtype == jnp.float32
  narrow = network.create(7, **SMALL[name], dtype=jnp.bfloat16)
  assert "bf16" in str(jax.make_jaxpr(narrow.apply)(variables, images))


def test_what_computes_in_float64_rounds_nowhere_to_float32(x64):
  for name, network in networks.REGISTRY.items():
    module = network.create(7, **SMALL[name], dtype=jnp.float64)
    images = jnp.zeros((2, 32, 32, 3), jnp.float64)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float64), shapes)
    operations = str(jax.make_jaxpr(module.apply)(wide, images))
    assert "new_dtype=float32" not in operations


@pytest.mark.parametrize(
  ("name", "depth", "message"),
  [
    ("resnet", 11, "8 n + 2, such as 10 or 18,"),
    ("vgg", 12, "one of 11, 13, 16, 19"),
    ("wide_resnet", 11, "6 n + 4, such as 10, 16 or 28,"),
  ],
)
def test_a_wrong_depth_is_refused_with_the_rule(name, depth, message):
  network = networks.REGISTRY[name]
  assert network.depth_rule(depth) == message
  assert network.depth_rule(network.depth) is None


@pytest.mark.parametrize(
  ("name", "classes", "image", "count"),
  [
    ("mlp", 10, (14, 14, 1), 17_418),
    ("resnet", 10, (32, 32, 3), 11_173_962),
    ("vgg", 100, (32, 32, 3), 15_299_748),
    ("wide_resnet", 100, (32, 32, 3), 36_536_884),
  ],
)
def test_default_networks_have_the_parameters_of_the_standard_ones(
  name, classes, image, count
):
  network, images = networks.REGISTRY[name], jnp.zeros((1, *image))
  variables = jax.eval_shape(
    lambda: network.create(classes).init(jax.random.key(0), images)
  )
  sizes = [np.prod(x.shape) for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == count


@pytest.mark.parametrize("side", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("taps", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_a_convolution_to_few_pixels_is_xlas(side, taps, stride):
  padding = [(1, 1), (1, 1)] if (taps, stride) == (3, 2) else "SAME"
  rng = np.random.default_rng(0)
  x = rng.normal(size=(3, side, max(1, side - 1), 5)).astype(np.float32)
  kernel = rng.normal(size=(taps, taps, 5, 7)).astype(np.float32)
  layout = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
  expected, found = (
    convolve(x, kernel, (stride, stride), padding, **layout)
    for convolve in (lax.conv_general_dilated, layers.convolve)
  )
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

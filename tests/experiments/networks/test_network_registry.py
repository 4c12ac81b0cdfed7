"""A network is one file and one line; each entry does what it declares."""

import importlib
import json
import sys

import jax
from jax import numpy as jnp
import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments import networks

TOY = '''
"""A linear classifier."""

from flax import linen as nn

from fsam_optax.experiments import networks


class Linear(nn.Module):
  classes: int

  @nn.compact
  def __call__(self, x, train=False):
    return nn.Dense(self.classes)(x.reshape(len(x), -1))


networks.register(
  networks.Network(
    name="linear",
    build=lambda classes, **_: Linear(classes),
    depth=1,
    width=1,
    about="neither",
    depth_rule=lambda depth: None if depth == 1 else "1",
    takes_vectors=True,
  )
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """The file, and the line that names it, undone after the test."""
  (tmp_path / "toy_network.py").write_text(TOY)
  monkeypatch.syspath_prepend(tmp_path)
  before = dict(networks.REGISTRY)
  importlib.import_module("toy_network")
  yield
  networks.REGISTRY.clear()
  networks.REGISTRY.update(before)
  del sys.modules["toy_network"]


@pytest.mark.usefixtures("toy")
def test_a_toy_is_trained_by_its_name(tmp_path):
  words = (
    "--data digits --model linear --seeds 1 --epochs 2 --optimizers sgd "
    "--learning-rate 0.05"
  )
  __main__.main(["compare", *words.split(), "--output", str(tmp_path)])
  written = json.loads((tmp_path / "compare.json").read_text())
  assert written["config"]["model"] == "linear"
  assert written["results"]["sgd"]["test_accuracy"][0] > 20
  assert networks.REGISTRY["linear"].check_depth(2) == "1 for linear"


SMALL = {
  "mlp": (2, 4),
  "cnn": (2, 4),
  "resnet": (10, 4),
  "vgg": (11, 4),
  "wide_resnet": (10, 1),
}


@pytest.mark.parametrize("name", networks.REGISTRY)
def test_an_entry_builds_what_it_declares(name):
  network = networks.REGISTRY[name]
  assert network.name == name
  depth, width = SMALL[name]
  module = network.create(7, depth=depth, width=width)
  side = max(8, network.least_image)
  images = jnp.zeros((2, side, side, 3))
  variables = jax.eval_shape(
    lambda: module.init(jax.random.key(0), images, train=False)
  )
  assert ("batch_stats" in variables) == network.has_statistics
  logits = jax.eval_shape(
    lambda variables: module.apply(variables, images), variables
  )
  assert logits.shape == (2, 7)
  assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", networks.REGISTRY)
def test_default_depth_keeps_the_rule_of_its_network(name):
  network = networks.REGISTRY[name]
  assert network.check_depth(network.depth) is None
  assert network.check_depth(0).endswith(f"for {name}")


@pytest.mark.parametrize(
  ("name", "depth", "message"),
  [
    ("resnet", 11, "8 n + 2, such as 10 or 18, for resnet"),
    ("vgg", 12, "one of 11, 13, 16, 19 for vgg"),
    ("wide_resnet", 11, "6 n + 4, such as 10, 16 or 28, for wide_resnet"),
    ("mlp", 0, "1 or more for mlp"),
  ],
)
def test_a_wrong_depth_is_refused_with_the_rule(name, depth, message):
  assert networks.REGISTRY[name].check_depth(depth) == message


@pytest.mark.parametrize(
  ("name", "classes", "count"),
  [
    ("mlp", 10, 17_418),
    ("resnet", 10, 11_173_962),
    ("resnet", 100, 11_220_132),
    ("vgg", 100, 15_299_748),
    ("wide_resnet", 100, 36_536_884),
  ],
)
def test_default_networks_have_the_parameters_of_the_standard_ones(
  name, classes, count
):
  network = networks.REGISTRY[name]
  side = 14 if name == "mlp" else 32
  images = jnp.zeros((1, side, side, 1 if name == "mlp" else 3))
  variables = jax.eval_shape(
    lambda: network.create(classes).init(jax.random.key(0), images)
  )
  sizes = [np.prod(x.shape) for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == count


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_small_networks_compute_in_the_dtype_asked_for(name):
  module = networks.REGISTRY[name].create(3, dtype=jnp.bfloat16)
  images = jnp.ones((2, 8, 8, 1))
  variables = module.init(jax.random.key(0), images)
  text = str(jax.make_jaxpr(module.apply)(variables, images))
  assert "bf16" in text
  assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))

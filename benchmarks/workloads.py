"""The models whose steps are timed: what to initialize, and a loss."""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any, Callable, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax

from fsam_optax.experiments.networks import resnet

Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any]]


class Workload(NamedTuple):
  """A model with data of its shapes.

  Attributes:
    init: ``init(key)`` returns the parameters and the model state, such as
      BatchNorm's statistics, or None where the model has none.
    loss_fn: ``loss_fn(params, model_state, batch)`` returns a scalar and the
      new model state.
    batch: ``batch(rows)`` returns NumPy arrays, inputs and labels, the same in
      every benchmark.
  """

  init: Callable[[jax.Array], tuple[Any, Any]]
  loss_fn: Loss
  batch: Callable[[int], tuple[np.ndarray, ...]]

  def shapes(self) -> tuple[Any, Any, int]:
    """Shapes of the parameters and the model state; number of parameters."""
    params, model_state = jax.eval_shape(self.init, jax.random.key(0))
    return params, model_state, sum(x.size for x in jax.tree.leaves(params))


CLASSES = 10
MLP_LAYERS = (784, 1408, 1264, CLASSES)  # 2.9 million parameters.
WIDE_LAYERS = (784, 8192, 8192, 8192, CLASSES)  # 141 million parameters.
CNN_CHANNELS = (3, 32, 64, 64)
CNN_STRIDES = (1, 2, 2)
IMAGE = (32, 32, 3)
VOCABULARY, LENGTH, WIDTH, DEPTH, HEADS = 256, 32, 128, 2, 4


def _normal(key, *shape, fan_in):
  return jax.random.normal(key, shape) * (2 / fan_in) ** 0.5


def _cross_entropy(logits, labels):
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _labeled(shape, classes, rows):
  """Rows of numbers of a shape, with labels."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(rows, *shape)).astype(np.float32)
  return x, rng.integers(0, classes, rows).astype(np.int32)


def _tokens(vocabulary, length, rows):
  """Rows of tokens, with the next ones for labels."""
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
  return tokens[:, :-1], tokens[:, 1:]


def _stateless(init, loss_fn, batch) -> Workload:
  """Of a model that is its parameters alone."""
  return Workload(
    lambda key: (init(key), None),
    lambda params, model_state, batch: (loss_fn(params, batch), model_state),
    batch,
  )


def mlp(
  layers: Sequence[int] = MLP_LAYERS, dtype: Any = jnp.float32
) -> Workload:
  """Fully connected layers with ReLU between; the parameters are float32."""

  def init(key):
    params = {}
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(layers)):
      key, own = jax.random.split(key)
      params[f"layer_{i:03d}"] = {  # JAX sorts by name.
        "kernel": _normal(own, fan_in, fan_out, fan_in=fan_in),
        "bias": jnp.zeros(fan_out),
      }
    return params

  def loss_fn(params, batch):
    x, labels = batch
    x, layers = optax.tree.cast((x, list(params.values())), dtype)
    *hidden, output = layers
    for layer in hidden:
      x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ output["kernel"] + output["bias"]
    return _cross_entropy(logits.astype(jnp.float32), labels)

  batch = functools.partial(_labeled, layers[:1], layers[-1])
  return _stateless(init, loss_fn, batch)


def cnn() -> Workload:
  """Three convolutions of 3 x 3 on images of 32 x 32, and a linear layer."""
  features = CNN_CHANNELS[-1] * (IMAGE[0] // math.prod(CNN_STRIDES)) ** 2

  def init(key):
    keys = jax.random.split(key, len(CNN_CHANNELS))
    params = {
      f"conv_{i}": {
        "kernel": _normal(keys[i], 3, 3, fan_in, out, fan_in=9 * fan_in),
        "bias": jnp.zeros(out),
      }
      for i, (fan_in, out) in enumerate(itertools.pairwise(CNN_CHANNELS))
    }
    kernel = _normal(keys[-1], features, CLASSES, fan_in=features)
    params["output"] = {"kernel": kernel, "bias": jnp.zeros(CLASSES)}
    return params

  def loss_fn(params, batch):
    x, labels = batch
    for i, stride in enumerate(CNN_STRIDES):
      layer = params[f"conv_{i}"]
      x = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        (stride, stride),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
      x = jax.nn.relu(x + layer["bias"])
    x = x.reshape(x.shape[0], -1)
    output = params["output"]
    return _cross_entropy(x @ output["kernel"] + output["bias"], labels)

  batch = functools.partial(_labeled, IMAGE, CLASSES)
  return _stateless(init, loss_fn, batch)


def transformer() -> Workload:
  """Two pre-norm blocks of causal attention, over 32 tokens."""

  def init(key):
    keys = iter(jax.random.split(key, 2 + 4 * DEPTH))
    block = lambda: {
      "qkv": _normal(next(keys), WIDTH, 3 * WIDTH, fan_in=WIDTH),
      "out": _normal(next(keys), WIDTH, WIDTH, fan_in=WIDTH),
      "up": _normal(next(keys), WIDTH, 4 * WIDTH, fan_in=WIDTH),
      "down": _normal(next(keys), 4 * WIDTH, WIDTH, fan_in=4 * WIDTH),
      "scales": jnp.ones((2, WIDTH)),
    }
    return {
      "tokens": 0.02 * jax.random.normal(next(keys), (VOCABULARY, WIDTH)),
      "positions": 0.02 * jax.random.normal(next(keys), (LENGTH, WIDTH)),
      **{f"block_{i}": block() for i in range(DEPTH)},
    }

  def normalize(x, scale):
    mean = x.mean(-1, keepdims=True)
    return scale * (x - mean) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)

  def loss_fn(params, batch):
    tokens, targets = batch
    x = params["tokens"][tokens] + params["positions"]
    for i in range(DEPTH):
      block = params[f"block_{i}"]
      qkv = normalize(x, block["scales"][0]) @ block["qkv"]
      heads = (*x.shape[:2], HEADS, -1)
      q, k, v = (y.reshape(heads) for y in jnp.split(qkv, 3, axis=-1))
      y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
      x = x + y.reshape(x.shape) @ block["out"]
      y = jax.nn.relu(normalize(x, block["scales"][1]) @ block["up"])
      x = x + y @ block["down"]
    return _cross_entropy(x @ params["tokens"].T, targets)

  batch = functools.partial(_tokens, VOCABULARY, LENGTH)
  return _stateless(init, loss_fn, batch)


def many_leaves(leaves: int) -> Workload:
  """So many vectors of 2^18 parameters together, a linear unit each.

  The units share their inputs, so that the passes take as many operations
  however the parameters are cut.
  """
  size = 2**18 // leaves

  def init(key):
    draws = jax.random.normal(key, (leaves, size)) / size**0.5
    return {f"leaf_{i}": draws[i] for i in range(leaves)}

  def loss_fn(params, batch):
    x, targets = batch
    errors = [(x @ w - targets) ** 2 for w in params.values()]
    return jnp.mean(sum(errors)) / leaves

  def batch(rows):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return draw(rows, size), draw(rows)

  return _stateless(init, loss_fn, batch)


class Decoder(nn.Module):
  """Pre-norm blocks of causal attention and a feed-forward layer.

  With the defaults: 4,240,896 parameters.

  Attributes:
    vocabulary: number of tokens.
    length: longest sequence.
    width: of the embeddings.
    depth: number of blocks.
    heads: number of attention heads, a divisor of the width.
    dtype: of the computation; parameters are float32.
  """

  vocabulary: int = 4096
  length: int = 128
  width: int = 256
  depth: int = 4
  heads: int = 8
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Maps tokens `[B, T]` to logits of the next `[B, T, vocabulary]`."""
    embed = nn.Embed(self.vocabulary, self.width, dtype=self.dtype)
    positions = self.param(
      "positions", nn.initializers.normal(0.02), (self.length, self.width)
    )
    x = embed(tokens) + positions[: tokens.shape[1]].astype(self.dtype)
    mask = nn.make_causal_mask(tokens)
    for _ in range(self.depth):
      attention = nn.SelfAttention(self.heads, dtype=self.dtype)
      x = x + attention(nn.LayerNorm(dtype=self.dtype)(x), mask)
      y = nn.Dense(4 * self.width, dtype=self.dtype)(
        nn.LayerNorm(dtype=self.dtype)(x)
      )
      x = x + nn.Dense(self.width, dtype=self.dtype)(nn.gelu(y))
    x = nn.LayerNorm(dtype=self.dtype)(x)
    return embed.attend(x).astype(jnp.float32)


def decoder(**sizes: Any) -> Workload:
  """The decoder-only transformer, by default of 4.2 million parameters."""
  network = Decoder(**sizes)

  def init(key):
    tokens = jnp.zeros((1, network.length), jnp.int32)
    return network.init(key, tokens)["params"]

  def loss_fn(params, batch):
    tokens, targets = batch
    return _cross_entropy(network.apply({"params": params}, tokens), targets)

  batch = functools.partial(_tokens, network.vocabulary, network.length)
  return _stateless(init, loss_fn, batch)


def residual(**sizes: Any) -> Workload:
  """A ResNet with BatchNorm on images of 32 x 32, by default ResNet-18."""
  network = resnet.ResNet(CLASSES, **sizes)

  def init(key):
    variables = network.init(key, jnp.zeros((1, *IMAGE)), train=False)
    model_state = dict(variables)
    return model_state.pop("params"), model_state

  def loss_fn(params, model_state, batch):
    images, labels = batch
    logits, model_state = network.apply(
      {"params": params, **model_state},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    return _cross_entropy(logits, labels), model_state

  return Workload(init, loss_fn, functools.partial(_labeled, IMAGE, CLASSES))


WORKLOADS: dict[str, Callable[[], Workload]] = {
  "mlp": mlp,  # The first three have their like in torch_peers.py.
  "cnn": cnn,
  "transformer": transformer,
  "perceptron": functools.partial(mlp, WIDE_LAYERS),
  "perceptron-bfloat16": functools.partial(mlp, WIDE_LAYERS, jnp.bfloat16),
  "decoder": decoder,
  "decoder-bfloat16": functools.partial(decoder, dtype=jnp.bfloat16),
  "resnet18": residual,
  "resnet18-bfloat16": functools.partial(residual, dtype=jnp.bfloat16),
  # To see that a command runs, in seconds.
  "mlp-tiny": functools.partial(mlp, (784, 32, CLASSES)),
  "resnet-tiny": functools.partial(residual, width=8, blocks=(1,)),
}

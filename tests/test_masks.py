"""Masks: which leaves are perturbed, and what the others save."""

from typing import Any, NamedTuple

import equinox as eqx
from flax import linen as nn
from flax import nnx
import jax
from jax import numpy as jnp
import numpy as np
import pytest
from versions import as_pure

import fsam_optax
from fsam_optax import masks


def chosen(mask):
  """The paths at True, spelled by JAX."""
  leaves = jax.tree_util.tree_leaves_with_path(mask)
  spell = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {spell(path) for path, is_chosen in leaves if is_chosen}


class Block(nn.Module):
  """A transformer's, with four kinds of norms, attention and dense layers."""

  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, normalize_qk=True)(
      y, y
    )
    return x + nn.Dense(4)(nn.RMSNorm()(x)), None


class Transformer(nn.Module):
  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(5, 4)(tokens)
    x, _ = Block(name="single")(x, None)
    scanned = nn.scan(
      Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    x, _ = scanned(name="stack")(x, None)
    return nn.Dense(2)(nn.GroupNorm(1)(x))


def told(params):
  """What each of both masks selects, without the boxes around arrays."""
  return tuple(
    {path.removesuffix("/value") for path in chosen(mask(params))}
    for mask in (masks.exclude_biases_and_norms, masks.norms_only)
  )


@pytest.mark.parametrize("boxed", [False, True], ids=["bare", "partitioned"])
def test_linen_attention_and_scanned_layers(boxed):
  tokens = jnp.zeros((1, 3), int)
  variables = jax.eval_shape(Transformer().init, jax.random.key(0), tokens)
  params = variables["params"]
  if boxed:
    params = jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), params)
  attention = "MultiHeadDotProductAttention_0"
  of_blocks = lambda *leaves: {
    f"{block}/{leaf}" for block in ("single", "stack") for leaf in leaves
  }
  kernels = of_blocks(
    "Dense_0/kernel",
    *(f"{attention}/{x}/kernel" for x in ("query", "key", "value", "out")),
  )
  norms = of_blocks(
    "LayerNorm_0/scale",
    "LayerNorm_0/bias",
    "RMSNorm_0/scale",
    *(f"{attention}/{x}_ln/scale" for x in ("query", "key")),
  )
  assert told(params) == (
    kernels | {"Embed_0/embedding", "Dense_0/kernel"},
    norms | {"GroupNorm_0/scale", "GroupNorm_0/bias"},
  )


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.ln = nnx.LayerNorm(4, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    self.mlp = nnx.data([nnx.Linear(4, 4, rngs=rngs)])
    self.norms = nnx.data([nnx.RMSNorm(4, rngs=rngs)])
    self.adapter = nnx.LoRA(4, 2, 4, rngs=rngs)


# In a stack all have one dimension more, so that names decide, not dimensions.


@pytest.mark.parametrize("pure", [False, True], ids=["variables", "arrays"])
def test_nnx_layers_in_a_stack(pure):
  make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=0))
  params = nnx.state(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param)
  assert told(as_pure(params) if pure else params) == (
    {
      *(f"attention/{x}/kernel" for x in ("query", "key", "value", "out")),
      *("mlp/0/kernel", "adapter/lora_a", "adapter/lora_b"),
    },
    {"ln/scale", "ln/bias", "norms/0/scale"},
  )


def test_a_field_may_be_called_value():
  class Heads(NamedTuple):
    query: Any
    value: Any

  params = {"bias_free": Heads(*[jnp.ones((2, 2))] * 2)}
  both = {"bias_free/query", "bias_free/value"}
  assert chosen(masks.exclude_biases_and_norms(params)) == both
  assert chosen(masks.by_path("query|value")(params)) == both


class EquinoxBlock(eqx.Module):
  norm: eqx.nn.LayerNorm
  ln2: eqx.nn.RMSNorm
  norms: list
  attention: eqx.nn.MultiheadAttention
  mlp: eqx.nn.MLP
  cell: eqx.nn.GRUCell

  def __init__(self, key):
    self.norm = eqx.nn.LayerNorm(4)
    self.ln2 = eqx.nn.RMSNorm(4, use_bias=False)
    self.norms = [eqx.nn.GroupNorm(2, 4)]
    self.attention = eqx.nn.MultiheadAttention(
      2, 4, use_query_bias=True, key=key
    )
    self.mlp = eqx.nn.MLP(4, 4, 4, depth=1, key=key)
    self.cell = eqx.nn.GRUCell(4, 4, key=key)


def test_equinox_layers_in_a_stack():
  keys = jax.random.split(jax.random.key(0), 3)
  block = eqx.filter_eval_shape(eqx.filter_vmap(EquinoxBlock), keys)
  params = eqx.filter(block, lambda x: hasattr(x, "dtype"))
  assert told(params) == (
    {
      *(f"attention/{x}_proj/weight" for x in ("query", "key", "value")),
      "attention/output_proj/weight",
      *("mlp/layers/0/weight", "mlp/layers/1/weight"),
      *("cell/weight_ih", "cell/weight_hh"),
    },
    {
      *("norm/weight", "norm/bias", "ln2/weight"),
      *("norms/0/weight", "norms/0/bias"),
    },
  )


def ones(**shapes):
  return {name: jnp.ones(shape) for name, shape in shapes.items()}


NORMS = ["LayerNorm_0", "bn1", "norm", "GroupNorm_2", "RMSNorm_0", "ln_f"]
NORMS += ["query_ln", "attention_ln_1"]
OTHERS = ["Dense_0", "ebn", "kiln", "lnorm_w"]
DENSE = ones(kernel=(4, 4), bias=(4,))


# Trees; what exclude_biases_and_norms selects; and what norms_only.
NAMED = {
  "norms": (ones(**dict.fromkeys(NORMS + OTHERS, (2,))), set(), set(NORMS)),
  # Haiku names modules in one key.
  "Haiku, stacked": (
    {
      "mlp/~/linear_0": ones(w=(3, 4, 8), b=(3, 8)),
      "mlp/~/layer_norm": ones(scale=(3, 8), offset=(3, 8)),
      "resnet/~/batchnorm": ones(scale=(3, 1, 1, 4), offset=(3, 1, 1, 4)),
      "gru": ones(w_i=(3, 4, 12), w_h=(3, 4, 12), b=(3, 12)),
      "conv2_d": ones(w=(3, 3, 3, 4, 4), b=(3, 4, 1, 1)),
      "embed": ones(embeddings=(3, 5, 4)),
    },
    {
      *("mlp/~/linear_0/w", "gru/w_i", "gru/w_h", "conv2_d/w"),
      "embed/embeddings",
    },
    {
      *("mlp/~/layer_norm/scale", "mlp/~/layer_norm/offset"),
      *("resnet/~/batchnorm/scale", "resnet/~/batchnorm/offset"),
    },
  ),
  "names that say half": (
    {
      "lora": ones(a=(4, 2), b=(2, 4)),
      "lora_beside": ones(w=(4, 4), a=(4, 2), b=(2, 4)),
      "mine": ones(
        w1=(3, 4, 4),
        b1=(3, 4),
        ln1_scale=(3, 4),
        norm_gain=(3, 4),
        scale_kernel=(4, 4),
        cls_token=(1, 1, 4),
        temperature=(),
        value=(4, 4),
      ),
      **ones(kernel=(8,), value=(4, 4)),
    },
    {
      *("lora/a", "lora/b", "lora_beside/w", "lora_beside/a", "lora_beside/b"),
      *("mine/w1", "mine/scale_kernel", "mine/cls_token", "mine/value"),
      "value",
    },
    {"mine/ln1_scale", "mine/norm_gain"},
  ),
  "a layer with a kernel is no norm": (
    {
      "prenorm_mlp": DENSE,
      "norm_and_dense": {
        "Dense_0": DENSE,
        "LayerNorm_0": ones(scale=(4,), bias=(4,)),
      },
      # As its flax twin under nn.scan, where the bias has two dimensions.
      "norm_stack": ones(kernel=(3, 4, 4), bias=(3, 4)),
      # Of Equinox, where a norm's scale is a weight, too.
      "norm_linear": ones(weight=(4, 4), bias=(4,)),
    },
    {
      *("prenorm_mlp/kernel", "norm_and_dense/Dense_0/kernel"),
      *("norm_stack/kernel", "norm_linear/weight"),
    },
    {"norm_and_dense/LayerNorm_0/scale", "norm_and_dense/LayerNorm_0/bias"},
  ),
}


@pytest.mark.parametrize(
  ("tree", "kernels", "norms"), NAMED.values(), ids=NAMED
)
def test_leaves_are_told_by_the_names_that_libraries_give(tree, kernels, norms):
  assert chosen(masks.exclude_biases_and_norms(tree)) == kernels
  assert chosen(masks.norms_only(tree)) == norms


def test_a_mask_by_path_finds_a_pattern_in_any_case():
  params = {"Dense_0": DENSE, "adapter": ones(lora_a=(4, 2), lora_b=(2, 4))}
  found = chosen(masks.by_path("LoRA")(params))
  assert found == {"adapter/lora_a", "adapter/lora_b"}
  # As NNX and Linen box arrays: what holds them has no name in the path.
  layer = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  boxed = {"kernel": nn.Partitioned(jnp.ones(2), (None,))}
  for params in (layer, as_pure(layer), boxed):
    found = chosen(masks.by_path("^kernel$")(params))
    assert {path.removesuffix("/value") for path in found} == {"kernel"}


def test_a_mask_of_a_class_that_can_be_called_is_a_tree():
  model = eqx.filter(eqx.nn.Linear(2, 3, key=jax.random.key(0)), eqx.is_array)
  mask = jax.tree.map(lambda x: x.ndim > 1, model)
  assert callable(mask)
  ascent = fsam_optax.sam_perturbation(0.1, mask=mask)
  epsilon, _ = ascent.update(model, ascent.init(model), model)
  assert not epsilon.bias.any()
  np.testing.assert_allclose(np.linalg.norm(epsilon.weight), 0.1, rtol=1e-5)

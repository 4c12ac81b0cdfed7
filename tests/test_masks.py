"""Masks: which leaves are perturbed, and what the others save."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import masks


@pytest.fixture(scope="module")
def params():
  return {
    "Dense_0": {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)},
    "BatchNorm_0": {"scale": jnp.ones(64), "bias": jnp.ones(64)},
    "adapter": {"lora_a": jnp.ones((64, 2)), "lora_b": jnp.ones((2, 64))},
  }


SELECTED = {
  "exclude_biases_and_norms": {"kernel", "lora_a", "lora_b"},
  "norms_only": {"scale", "bias"},
  "by_path": {"lora_a", "lora_b"},
}


def ready_mask(name):
  mask = getattr(masks, name)
  return mask("LoRA") if name == "by_path" else mask


@pytest.mark.parametrize("name", SELECTED)
def test_excluded_leaves_stay_and_cost_no_memory(name, params):
  mask = ready_mask(name)
  bools = mask(params)
  perturbation = fsam_optax.friendly_perturbation(rho=0.5, mask=mask)
  state = perturbation.init(params)
  size = sum(
    x.size
    for x, m in zip(
      jax.tree.leaves(params), jax.tree.leaves(bools), strict=True
    )
    if m
  )
  held = sum(x.nbytes for x in jax.tree.leaves(state) if x.ndim)
  assert held == 4 * size  # The average of the selected leaves and no more.
  grads = jax.tree.map(jnp.ones_like, params)
  epsilon, _ = perturbation.update(grads, state, params)
  jax.tree.map(
    lambda e, m: np.testing.assert_allclose(
      e, (0.5 / size**0.5) if m else 0.0, rtol=1e-5
    ),
    epsilon,
    bools,
  )


def test_compiled_excluded_weights_are_not_even_copied(params):
  """The masked step reads and writes less than the unmasked one."""

  def bytes_accessed(mask):
    perturbation = fsam_optax.friendly_perturbation(mask=mask)
    update = jax.jit(perturbation.update)
    compiled = update.lower(params, perturbation.init(params), params).compile()
    return compiled.cost_analysis()["bytes accessed"]

  norms = bytes_accessed(masks.norms_only)
  assert norms < bytes_accessed(None) / 2


@pytest.mark.parametrize(
  ("name", "leaves"),
  [
    ("exclude_biases_and_norms", {"Dense_0/kernel"}),
    ("norms_only", {"BatchNorm_0/scale", "BatchNorm_0/bias"}),
  ],
)
def test_ready_masks_select_what_they_say(name, leaves, params):
  flat = jax.tree_util.tree_leaves_with_path(ready_mask(name)(params))
  chosen = {"/".join(k.key for k in path) for path, m in flat if m}
  assert {p for p in chosen if "adapter" not in p} == leaves


def test_norms_are_found_by_the_names_flax_and_others_give():
  names = ["LayerNorm_0", "bn1", "norm", "GroupNorm_2", "RMSNorm_0"]
  params = {name: jnp.ones(2) for name in [*names, "Dense_0", "ebn"]}
  mask = masks.norms_only(params)
  assert {name for name, m in mask.items() if m} == set(names)


def test_adapters_train_without_gradient_or_average_of_the_frozen_weights():
  """As documented: the frozen weights are the model state, not parameters."""

  def loss_fn(params, model_state, batch, rng):
    del rng
    kernel = model_state["frozen"] + params["lora_a"] @ params["lora_b"]
    return jnp.mean((batch @ kernel) ** 2), (model_state, {})

  frozen = jax.random.normal(jax.random.key(0), (16, 16))
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params={"lora_a": jnp.ones((16, 1)), "lora_b": jnp.zeros((1, 16))},
    tx=optax.sgd(0.1),
    perturbation=fsam_optax.friendly_perturbation(),
    model_state={"frozen": frozen},
  )
  step = fsam_optax.make_train_step(loss_fn, jit=False)
  new_state, _ = step(state, jnp.eye(16))
  np.testing.assert_array_equal(new_state.model_state["frozen"], frozen)
  assert float(jnp.abs(new_state.params["lora_b"]).max()) > 0
  sizes = [x.size for x in jax.tree.leaves(new_state.perturbation_state)]
  assert max(sizes) == 16
  jaxpr = str(jax.make_jaxpr(step)(state, jnp.eye(16)))
  # The frozen weights' gradient would be a product of batch and cotangent.
  assert jaxpr.count("dot_general") < 2 * 2 * 4

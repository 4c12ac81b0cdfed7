"""Masked means: a loss over ragged rows is the mean over all their tokens."""

import chex
import faces
from faces import state_of
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

# Real tokens in each of 8 rows, of 5: micro-batch or replica i of 4 gets rows i
# and i + 4, or 2 i and 2 i + 1, so one of each holds padding alone.
LENGTHS = np.array([5, 0, 2, 3, 1, 0, 0, 0])
TOKENS = int(LENGTHS.sum())


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  return {
    "x": jnp.asarray(rng.normal(size=(8, 5, 3)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=(8, 5)), jnp.float32),
    "mask": jnp.asarray(np.arange(5) < LENGTHS[:, None], jnp.float32),
  }


PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array(0.1)}
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.3)


def errors(params, batch):
  return batch["x"] @ params["w"] + params["b"] - batch["y"]


def own_mean(params, batch):
  """What users write: divided by the tokens that this part has."""
  tokens = batch["mask"].sum()
  loss = (errors(params, batch) ** 2 * batch["mask"]).sum() / tokens
  size = (jnp.abs(errors(params, batch)) * batch["mask"]).sum() / tokens
  return loss, {"tokens": tokens, "absolute": size}


def whole_batch(params, batch):
  """The same over all tokens, of which every row has its own share."""
  return (errors(params, batch) ** 2 * batch["mask"]).sum() / TOKENS


def by_hand(batch, steps=3):
  """F-SAM on the whole batch, from jax.grad and the perturbation alone."""
  batches = jax.tree.map(lambda x: jnp.stack([x] * steps), batch)
  (params, *_), seen = faces.train(
    faces.chain, whole_batch, PARAMS, batches, optax.sgd(0.1), PERTURBATION
  )
  return params, seen.loss[-1], seen.perturbed_loss[-1]


def run(fn, batch, steps=3):
  params, state = PARAMS, PERTURBATION.init(PARAMS)
  for _ in range(steps):
    (loss, aux), grads, state, info = fn(params, state, batch)
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
  return params, loss, aux, info


def test_parts_that_ascend_alone_weigh_their_tokens_too(batch):
  """Without a radius each ascends nowhere: it is one gradient again."""
  fn = fsam_optax.value_and_grad(
    own_mean,
    fsam_optax.friendly_perturbation(rho=0.0),
    has_aux=True,
    num_microbatches=4,
    sync_perturbation=False,
    weight="tokens",
  )
  params, _, _, info = run(jax.jit(fn), batch, steps=1)
  gradient = jax.grad(whole_batch)(PARAMS, batch)
  expected = jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, gradient)
  chex.assert_trees_all_close(params, expected, rtol=1e-5)
  assert np.isfinite(info.perturbed_value)


@pytest.mark.parametrize("axis", ["parts", "replicas"])
def test_every_token_counts_alike_over_parts_and_replicas(batch, axis):
  options = {"num_microbatches": 4} if axis == "parts" else {}
  step = fsam_optax.make_train_step(
    lambda params, model_state, batch, rng: (
      own_mean(params, batch)[0],
      (model_state, own_mean(params, batch)[1]),
    ),
    weight="tokens",
    jit=False,
    **(options or {"axis_name": "batch"}),
  )
  if axis == "replicas":
    step = fsam_optax.sharding.group_step(step, 4)
  state = state_of(PARAMS, PERTURBATION)
  step = jax.jit(step)
  sizes = np.abs(np.asarray(errors(PARAMS, batch)))
  for t in range(3):
    state, metrics = step(state, batch)
    if t == 0:
      np.testing.assert_allclose(
        metrics["absolute"], (sizes * batch["mask"]).sum() / TOKENS, rtol=1e-5
      )
    assert metrics["tokens"] == TOKENS
    assert metrics["skipped"] == 0
  params, loss, perturbed_loss = by_hand(batch)
  chex.assert_trees_all_close(state.params, params, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["perturbed_loss"], perturbed_loss, rtol=1e-5
  )


def test_a_batch_of_padding_alone_moves_nothing(batch):
  padding = batch | {"mask": jnp.zeros_like(batch["mask"])}
  fn = fsam_optax.value_and_grad(
    own_mean, PERTURBATION, has_aux=True, num_microbatches=4, weight="tokens"
  )
  params, loss, aux, info = run(fn, padding)
  chex.assert_trees_all_equal(params, PARAMS)
  assert loss == aux["tokens"] == info.perturbation_norm == 0

"""Masked means: a loss over ragged rows is the mean over all their tokens."""

import chex
import faces
from faces import state_of
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
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


def in_parts(batch, perturbation, **options):
  """What the two passes return, of four parts."""
  fn = fsam_optax.value_and_grad(
    own_mean,
    perturbation,
    has_aux=True,
    num_microbatches=4,
    weight="tokens",
    **options,
  )
  return jax.jit(fn)(PARAMS, perturbation.init(PARAMS), batch)


def test_parts_that_ascend_alone_weigh_their_tokens_too(batch):
  """Without a radius each ascends nowhere: it is one gradient again."""
  perturbation = fsam_optax.friendly_perturbation(rho=0.0)
  _, grads, _, info = in_parts(batch, perturbation, sync_perturbation=False)
  gradient = jax.grad(whole_batch)(PARAMS, batch)
  chex.assert_trees_all_close(grads, gradient, rtol=1e-5)
  assert np.isfinite(info.perturbed_value)


def test_a_batch_of_padding_alone_moves_nothing(batch):
  padding = batch | {"mask": jnp.zeros_like(batch["mask"])}
  (loss, aux), grads, _, info = in_parts(padding, PERTURBATION)
  chex.assert_trees_all_equal(grads, optax.tree.zeros_like(PARAMS))
  assert loss == aux["tokens"] == info.perturbation_norm == 0


@pytest.mark.parametrize(("parts", "replicas"), [(4, 1), (1, 4), (2, 2)])
def test_every_token_counts_alike_over_parts_and_replicas(
  batch, parts, replicas
):
  """Three steps as those of the chain on all tokens."""
  step = faces.step_of(
    own_mean,
    has_aux=True,
    weight="tokens",
    jit=False,
    num_microbatches=parts,
    axis_name="batch",
  )
  step = fsam_optax.sharding.group_step(step, replicas)
  batches = jax.tree.map(lambda x: jnp.stack([x] * 3), batch)
  state, metrics = jax.jit(lambda s: jax.lax.scan(step, s, batches))(
    state_of(PARAMS, PERTURBATION)
  )
  (params, *_), seen = faces.train(
    faces.chain, whole_batch, PARAMS, batches, optax.sgd(0.1), PERTURBATION
  )
  chex.assert_trees_all_close(state.params, params, rtol=1e-5)
  np.testing.assert_allclose(metrics["loss"], seen.loss, rtol=1e-5)
  np.testing.assert_allclose(
    metrics["perturbed_loss"], seen.perturbed_loss, rtol=1e-5
  )
  sizes = np.abs(np.asarray(errors(PARAMS, batch))) * batch["mask"]
  np.testing.assert_allclose(
    metrics["absolute"][0], sizes.sum() / TOKENS, rtol=1e-5
  )
  assert metrics["tokens"].tolist() == [TOKENS] * 3
  assert not metrics["skipped"].any()


@pytest.mark.parametrize(("parts", "replicas"), [(4, 1), (1, 4)])
def test_statistics_of_padding_alone_are_not_kept(batch, parts, replicas):
  """Each part that has tokens moves them; replicas' are averaged."""
  mean_of = lambda x, mask: (x * mask[..., None]).sum((0, 1)) / mask.sum()

  def loss_fn(params, model_state, batch, rng):
    loss, metrics = own_mean(params, batch)
    seen = mean_of(batch["x"], batch["mask"])
    moved = 0.9 * model_state["mean"] + 0.1 * seen
    others = {"calls": model_state["calls"] + 1, "has_begun": True}
    return loss, ({"mean": moved, **others}, metrics)

  step = fsam_optax.make_train_step(
    loss_fn,
    weight="tokens",
    jit=False,
    num_microbatches=parts,
    axis_name="batch",
  )
  step = fsam_optax.sharding.group_step(step, replicas)
  others = {"calls": jnp.array(0), "has_begun": jnp.array(False)}
  statistics = {"mean": jnp.ones(3), **others}
  state = state_of(PARAMS, PERTURBATION, model_state=statistics)
  after, metrics = jax.jit(step)(state, batch)
  expected = [np.ones(3) for _ in range(replicas)]
  for part in range(4):
    rows = slice(part, None, 4) if parts == 4 else slice(2 * part, 2 * part + 2)
    if batch["mask"][rows].any():
      seen = mean_of(batch["x"][rows], batch["mask"][rows])
      mine = part % replicas
      expected[mine] = 0.9 * expected[mine] + 0.1 * np.asarray(seen)
  found = after.model_state
  np.testing.assert_allclose(found["mean"], np.mean(expected, 0), rtol=1e-5)
  assert found["calls"] == parts
  assert found["has_begun"]
  assert metrics["skipped"] == 0


def test_a_weight_that_is_no_number_skips_the_step(batch):
  state = state_of(PARAMS, PERTURBATION)
  lost = lambda params, batch: (own_mean(params, batch)[0], {"n": jnp.nan})
  step = faces.step_of(lost, has_aux=True, weight="n", jit=False)
  after, metrics = step(state, batch)
  assert metrics["skipped"] == 1
  chex.assert_trees_all_equal(after.params, state.params)

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


def check(found, batch):
  params, loss, aux, info = found
  expected, expected_loss, perturbed_loss = by_hand(batch)
  chex.assert_trees_all_close(params, expected, rtol=1e-5)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  np.testing.assert_allclose(info.perturbed_value, perturbed_loss, rtol=1e-5)
  assert float(np.ravel(aux["tokens"])[0]) == TOKENS


def test_without_a_weight_the_mean_of_means_is_not_a_number(batch):
  fn = fsam_optax.value_and_grad(
    own_mean, PERTURBATION, has_aux=True, num_microbatches=4
  )
  assert np.isnan(run(fn, batch, steps=1)[1])


@pytest.mark.parametrize("sync", [True, False])
def test_over_micro_batches_every_token_counts_alike(batch, sync):
  fn = fsam_optax.value_and_grad(
    own_mean,
    PERTURBATION if sync else fsam_optax.friendly_perturbation(rho=0.0),
    has_aux=True,
    num_microbatches=4,
    sync_perturbation=sync,
    weight="tokens",
  )
  found = run(jax.jit(fn), batch, steps=3 if sync else 1)
  if sync:
    check(found, batch)
    sizes = np.abs(np.asarray(errors(PARAMS, batch)))
    first = run(jax.jit(fn), batch, steps=1)[2]["absolute"]
    np.testing.assert_allclose(
      first, (sizes * batch["mask"]).sum() / TOKENS, rtol=1e-5
    )
  else:  # Without a radius each ascends nowhere: it is one gradient again.
    gradient = jax.grad(whole_batch)(PARAMS, batch)
    moved = jax.tree.map(lambda w, g: w - 0.1 * g, PARAMS, gradient)
    chex.assert_trees_all_close(found[0], moved, rtol=1e-5)
    assert np.isfinite(found[3].perturbed_value)


def test_over_replicas_every_token_counts_alike(batch):
  fn = fsam_optax.value_and_grad(
    own_mean, PERTURBATION, has_aux=True, axis_name="batch", weight="tokens"
  )
  split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)

  def replicated(params, state, batch):
    (loss, aux), grads, state, info = jax.vmap(
      fn, in_axes=(None, None, 0), axis_name="batch"
    )(params, state, batch)
    one = lambda tree: jax.tree.map(lambda x: x[0], tree)
    # The auxiliary outputs are each replica's own.
    np.testing.assert_array_equal(
      aux["tokens"], LENGTHS.reshape(4, 2).sum(axis=1)
    )
    aux = {"tokens": aux["tokens"].sum()}
    return (loss[0], aux), one(grads), one(state), one(info)

  check(run(replicated, split), batch)


@pytest.mark.parametrize("axis", ["parts", "replicas"])
def test_the_train_step_reports_means_over_all_tokens(batch, axis):
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

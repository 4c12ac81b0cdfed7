"""Gradient accumulation: one large batch's step in the memory of a part."""

from faces import state_of
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import pytest
from versions import set_mesh

import fsam_optax

ROWS, PARTS = 12, 4


def loss_fn(params, batch):
  hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
  return jnp.mean((hidden @ params["out"] - batch["y"]) ** 2)


@pytest.fixture(scope="module")
def problem():
  keys = jax.random.split(jax.random.key(0), 4)
  params = {
    "in": jax.random.normal(keys[0], (5, 7)),
    "bias": jnp.zeros(7),
    "out": jax.random.normal(keys[1], (7,)),
  }
  batch = {
    "x": jax.random.normal(keys[2], (ROWS, 5)),
    "y": jax.random.normal(keys[3], (ROWS,)),
  }
  return params, batch


@pytest.mark.parametrize("sync", [True, False])
def test_micro_batches_over_a_mesh_of_explicit_axes(problem, sync):
  params, batch = problem
  params = {
    "in": jnp.tile(params["in"], 2)[:, :8],
    "bias": jnp.zeros(8),
    "out": jnp.linspace(-1.0, 1.0, 8),
  }
  mesh = make_mesh("Explicit", data=2, model=4)
  place = lambda x, *names: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*names))
  )
  options = {"num_microbatches": 2, "sync_perturbation": sync}
  perturbation = fsam_optax.friendly_perturbation(rho=0.3, lmbda=0.5)

  def mesh_loss(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["in"] + params["bias"])
    rows = jax.typeof(batch["y"]).sharding
    outputs = jnp.matmul(hidden, params["out"], out_sharding=rows)
    return jnp.mean((outputs - batch["y"]) ** 2)

  fn = jax.jit(fsam_optax.value_and_grad(mesh_loss, perturbation, **options))
  with set_mesh(mesh):
    placed = {
      "in": place(params["in"], None, "model"),
      "bias": place(params["bias"], "model"),
      "out": place(params["out"], "model"),
    }
    rows = jax.tree.map(lambda x: place(x, "data"), batch)
    state = perturbation.init(placed)
    loss, grads, state, info = fn(placed, state, rows)
  for name, x in placed.items():
    assert jax.typeof(grads[name]).sharding == jax.typeof(x).sharding
    assert jax.typeof(state[0].ema[name]).sharding == jax.typeof(x).sharding
  by_one = fsam_optax.value_and_grad(loss_fn, perturbation, **options)
  expected = jax.jit(by_one)(params, perturbation.init(params), batch)
  for a, b in zip(
    jax.tree.leaves((loss, grads, state, info)),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_part_that_is_not_finite_leaves_the_average_as_it_was(problem):
  params, batch = problem
  perturbation = fsam_optax.friendly_perturbation(rho=0.3, lmbda=0.5)
  _, state = perturbation.update(params, perturbation.init(params), params)
  fn = fsam_optax.value_and_grad(
    loss_fn, perturbation, num_microbatches=PARTS, sync_perturbation=False
  )
  bad = {**batch, "y": batch["y"].at[1].set(jnp.nan)}
  _, _, (kept, _), _ = jax.jit(fn)(params, state, bad)
  jax.tree.map(np.testing.assert_array_equal, kept, state[0])


def test_statistics_fold_in_order_and_keys_differ_by_part():
  def stateful_loss(params, model_state, batch, rng):
    loss = jnp.mean((batch @ params["w"]) ** 2)
    mean = 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch)
    noise = jax.random.normal(rng)
    metrics = {"noise": noise, "noise_squared": noise**2, "number": 0.25}
    return loss, ({"mean": mean}, metrics)

  batch = jax.random.normal(jax.random.key(3), (ROWS, 2))
  state = state_of(
    {"w": jnp.ones(2)},
    fsam_optax.friendly_perturbation(),
    model_state={"mean": jnp.zeros([])},
    rng=jax.random.key(7),
  )
  step = fsam_optax.make_train_step(
    stateful_loss, num_microbatches=PARTS, jit=False
  )
  new_state, metrics = jax.jit(step)(state, batch)
  expected = 0.0
  for j in range(PARTS):  # Once, in order: the second pass moves nothing.
    expected = 0.5 * expected + 0.5 * np.mean(batch[j::PARTS])
  np.testing.assert_allclose(new_state.model_state["mean"], expected, rtol=1e-5)
  key = jax.random.fold_in(jax.random.key(7), 0)
  noise = np.array(
    [jax.random.normal(jax.random.fold_in(key, j)) for j in range(PARTS)]
  )
  assert len(set(noise.tolist())) == PARTS
  assert metrics["number"] == 0.25  # A Python number is one.
  np.testing.assert_allclose(metrics["noise"], noise.mean(), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["noise_squared"], (noise**2).mean(), rtol=1e-5
  )

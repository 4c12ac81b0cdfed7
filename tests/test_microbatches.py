"""Gradient accumulation: one large batch's step in the memory of a part."""

import chex
from faces import state_of
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import pytest
from versions import set_mesh

import fsam_optax

ROWS, PARTS = 12, 4


@pytest.mark.parametrize("sync", [True, False])
def test_micro_batches_over_a_mesh_of_explicit_axes(problem, sync):
  (inputs, _), params = problem.batch(0), problem.params["hidden"]
  mesh = make_mesh("Explicit", data=2, model=4)
  place = lambda x, *names: jax.device_put(
    x, jax.NamedSharding(mesh, jax.P(*names))
  )
  perturbation = fsam_optax.friendly_perturbation(rho=0.3, lmbda=0.5)
  fn = fsam_optax.value_and_grad(
    lambda p, x: jnp.mean(jnp.tanh(x @ p["kernel"] + p["bias"]) ** 2),
    perturbation,
    num_microbatches=2,
    sync_perturbation=sync,
  )
  run = jax.jit(lambda params, x: fn(params, perturbation.init(params), x))
  with set_mesh(mesh):
    placed = {
      "kernel": place(params["kernel"], None, "model"),
      "bias": place(params["bias"], "model"),
    }
    found = run(placed, place(inputs, "data"))
  _, grads, state, _ = found
  shardings = lambda tree: jax.tree.map(lambda x: jax.typeof(x).sharding, tree)
  assert shardings(grads) == shardings(state[0].ema) == shardings(placed)
  expected = run(params, inputs)
  chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=1e-6)


def test_a_part_that_is_not_finite_leaves_the_average_as_it_was(problem):
  params, (inputs, targets) = problem.params, problem.batch(0)
  perturbation = fsam_optax.friendly_perturbation(rho=0.3, lmbda=0.5)
  _, state = perturbation.update(params, perturbation.init(params), params)
  fn = fsam_optax.value_and_grad(
    problem.loss_fn,
    perturbation,
    num_microbatches=PARTS,
    sync_perturbation=False,
  )
  bad = inputs, targets.at[1].set(jnp.nan)
  _, _, (kept, _), _ = jax.jit(fn)(params, state, bad)
  jax.tree.map(np.testing.assert_array_equal, kept, state[0])


def test_statistics_fold_in_order_and_keys_differ_by_part():
  def stateful_loss(params, model_state, batch, rng):
    loss = jnp.mean((batch @ params["w"]) ** 2)
    mean = 0.5 * model_state["mean"] + 0.5 * jnp.mean(batch)
    metrics = {"noise": jax.random.normal(rng), "number": 0.25}
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

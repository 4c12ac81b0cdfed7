"""What optax asks of a contributed optimizer, check by check, for fsam."""

import chex
import jax
from jax import numpy as jnp
from meshes import make_mesh
import optax
import optax.tree
import pytest
from versions import set_mesh

import fsam_optax

ADAPTIVE = fsam_optax.fsam(1e-3, adaptive=True, order="paper")
LINKS = {
  "fsam": fsam_optax.fsam(1e-3),
  "adaptive, in the paper's order": ADAPTIVE,
  "sam": fsam_optax.sharpness_aware(fsam_optax.sam_perturbation(1e-3)),
}
OPTIMIZERS = {
  name: optax.chain(link, optax.sgd(1e-3)) for name, link in LINKS.items()
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


@pytest.mark.parametrize(
  "tx",
  [ADAPTIVE, fsam_optax.fsam(mask=True, accumulator_dtype=jnp.float32)],
  ids=["adaptive, in the paper's order", "masked, accumulated in float32"],
)
def test_the_types_of_the_state_are_stable_over_an_explicit_mesh(tx):
  """Shape, dtype, weak type and sharding, so that nothing compiles twice."""
  with set_mesh(make_mesh("Explicit", x=8)):
    params = jnp.ones((2, 8, 4), jnp.float16, out_sharding=jax.P(None, "x"))
    update = lambda g, s, p: tx.update(g, s, p, grad_fn=lambda p: 2 * p)
    types = lambda tree: jax.tree.map(jax.typeof, tree)
    state = tx.init(params)
    updates, updated = update(params, state, params)
    compiled_updates, compiled = jax.jit(update)(params, state, params)
    assert types(jax.jit(tx.init)(params)) == types(state)
    assert types(updated) == types(state)
    assert types(compiled) == types(state)
    assert types(updates) == types(compiled_updates) == types(params)
    assert "@x" in str(types(state))
    chex.assert_trees_all_close(updates, compiled_updates, rtol=1e-2)


# Each with its start, its minimum, and the loss.
TARGETS = [
  (
    jnp.array([-1.0, 10.0, 1.0]),
    jnp.array([1.0, -1.0, 1.0]),
    lambda w: jnp.sum((w - jnp.array([1.0, -1.0, 1.0])) ** 2),
  ),
  (
    jnp.zeros(2),
    jnp.ones(2),
    lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
  ),
]


@optimizers
def test_two_targets_converge_in_thirty_thousand_steps(name):
  """In one scan: a parabola and Rosenbrock's valley."""
  tx = OPTIMIZERS[name]
  starts, minima, losses = zip(*TARGETS, strict=True)

  def step(carry, _):
    following = []
    for (params, state), loss_fn in zip(carry, losses, strict=True):
      grad_fn = jax.grad(loss_fn)
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      following.append((optax.apply_updates(params, updates), state))
    return tuple(following), None

  carry = tuple((start, tx.init(start)) for start in starts)
  found = jax.jit(lambda c: jax.lax.scan(step, c, length=30_000)[0])(carry)
  for (params, _), minimum in zip(found, minima, strict=True):
    chex.assert_trees_all_close(params, minimum, rtol=3e-2, atol=3e-2)


@optimizers
def test_init_takes_abstract_parameters(name):
  tx = OPTIMIZERS[name]
  abstract = {
    "w": jax.ShapeDtypeStruct((2, 4, 8), jnp.bfloat16),
    "b": jax.ShapeDtypeStruct((), jnp.float32),
  }
  concrete = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
  chex.assert_trees_all_equal(tx.init(abstract), tx.init(concrete))


@optimizers
def test_map_params_finds_what_is_like_the_parameters(name):
  tx = OPTIMIZERS[name]
  params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
  state = tx.init(params)
  marked = optax.tree.map_params(
    tx,
    lambda _, name: name,
    state,
    {"w": "w", "b": "b"},
    transform_non_params=lambda _: None,
  )
  found = [] if name == "sam" else ["b", "w"]
  assert jax.tree.leaves(marked) == found

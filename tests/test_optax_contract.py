"""What optax asks of a contributed optimizer, check by check, for fsam."""

import inspect

import chex
import jax
from jax import numpy as jnp
from meshes import make_mesh
import optax
import optax.tree
import pytest
from versions import set_mesh

import fsam_optax

OPTIMIZERS = {
  "fsam": fsam_optax.fsam,
  "adaptive, in the paper's order": lambda rho=0.05: fsam_optax.fsam(
    rho, adaptive=True, order="paper"
  ),
  "sam": lambda rho=0.05: fsam_optax.sharpness_aware(
    fsam_optax.sam_perturbation(rho)
  ),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def chain(name, rho=0.05, learning_rate=0.1):
  return optax.chain(OPTIMIZERS[name](rho), optax.sgd(learning_rate))


def parabola(dtype=jnp.float32):
  goal = jnp.array([1.0, -1.0, 1.0], dtype)
  start = jnp.array([-1.0, 10.0, 1.0], dtype)
  return start, goal, lambda w: jnp.sum(jnp.square(w - goal))


def rosenbrock():
  valley = lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2
  return jnp.zeros(2), jnp.ones(2), valley


def tree_parabola():
  goal = (jnp.array([1.0, -1.0, 2.0]), jnp.array([[1.0, 0.0], [-1.0, 1.0]]))
  start = optax.tree.zeros_like(goal)
  return (
    start,
    goal,
    lambda w: optax.tree.norm(optax.tree.sub(w, goal), squared=True),
  )


TARGETS = [parabola, rosenbrock, tree_parabola]


def converge(tx, targets, lengths=30_000):
  """Minimizes independent targets in one scan of one program."""
  starts = tuple(start for start, _, _ in targets)
  grad_fns = [jax.grad(loss_fn) for _, _, loss_fn in targets]

  def step(carry, _):
    following = []
    for (params, state), grad_fn in zip(carry, grad_fns, strict=True):
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn
      )
      following.append((optax.apply_updates(params, updates), state))
    return tuple(following), None

  @jax.jit
  def run(starts):
    carry = tuple((params, tx.init(params)) for params in starts)
    return jax.lax.scan(step, carry, length=lengths)[0]

  return tuple(params for params, _ in run(starts))


@optimizers
def test_three_targets_converge_in_thirty_thousand_steps(name):
  targets = [target() for target in TARGETS]
  tx = chain(name, rho=1e-3, learning_rate=1e-3)
  chex.assert_trees_all_close(
    converge(tx, targets),
    tuple(goal for _, goal, _ in targets),
    rtol=3e-2,
    atol=3e-2,
  )


@optimizers
def test_accumulated_updates_are_zeros_of_the_dtype(name):
  params = jnp.array([1.0, 2.0], jnp.bfloat16)
  grad_fn = jax.grad(lambda w: jnp.sum(w**2))
  tx = optax.MultiSteps(chain(name), every_k_schedule=4)
  update = jax.jit(lambda g, s, p: tx.update(g, s, p, grad_fn=grad_fn))
  updates, _ = update(grad_fn(params), jax.jit(tx.init)(params), params)
  chex.assert_trees_all_equal(updates, jnp.zeros_like(params))
  assert updates.dtype == params.dtype


@optimizers
def test_state_is_stable_and_unknown_extra_args_pass(name, dtype):
  """In shape, dtype and sharding: both branches of a cond must agree.

  So nothing compiles twice.
  """
  tx = chain(name)
  params, _, loss_fn = parabola(dtype)
  grad_fn = jax.grad(loss_fn)
  state, traces = tx.init(params), []

  @jax.jit
  def step(go, params, state):
    traces.append(name)
    confusing = loss_fn(params).astype(
      jnp.bfloat16 if dtype == jnp.float16 else jnp.float16
    )
    updates, state = jax.lax.cond(
      go,
      lambda: tx.update(
        grad_fn(params),
        state,
        params,
        grad_fn=grad_fn,
        value=confusing,
        nobody_has_heard_of_this=1,
      ),
      lambda: (params, state),
    )
    return optax.apply_updates(params, updates), state

  describe = lambda tree: jax.tree.map(
    lambda x: (x.shape, x.dtype, x.weak_type, x.sharding), tree
  )
  before = describe((params, state))
  for go in (True, False):
    new_params, new_state = step(go, params, state)
    assert describe((new_params, new_state)) == before
    state = jax.lax.cond(go, lambda x, y: x, lambda x, y: y, state, new_state)
    assert describe((params, state)) == before
  assert traces == [name]


MESHED = {
  "fsam": fsam_optax.fsam(),
  "adaptive, in the paper's order": fsam_optax.fsam(
    adaptive=True, order="paper"
  ),
  "masked, accumulated in float32": fsam_optax.fsam(
    mask=True, accumulator_dtype=jnp.float32
  ),
}


@pytest.mark.parametrize("name", MESHED)
def test_types_of_the_state_survive_an_explicit_mesh(name):
  tx = MESHED[name]
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


@optimizers
def test_init_takes_abstract_parameters(name):
  tx = chain(name)
  abstract = {
    "w": jax.ShapeDtypeStruct((2, 4, 8), jnp.bfloat16),
    "b": jax.ShapeDtypeStruct((), jnp.float32),
  }
  concrete = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), abstract)
  chex.assert_trees_all_equal(tx.init(abstract), tx.init(concrete))
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(tx.init, abstract), tx.init(concrete)
  )


@optimizers
def test_map_params_finds_what_is_like_the_parameters(name):
  tx = chain(name)
  params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
  state = tx.init(params)
  chex.assert_trees_all_equal(
    optax.tree.map_params(tx, lambda x: x, state), state
  )
  marked = optax.tree.map_params(
    tx,
    lambda _, name: name,
    state,
    {"w": "w", "b": "b"},
    transform_non_params=lambda _: None,
  )
  found = [] if name == "sam" else ["b", "w"]
  assert jax.tree.leaves(marked) == found


def test_every_parameter_of_a_factory_has_a_name():
  """inject_hyperparams reads the signature."""
  for factory in (
    fsam_optax.fsam,
    fsam_optax.friendly_perturbation,
    fsam_optax.sam_perturbation,
    fsam_optax.subtract_gradient_ema,
    fsam_optax.scale_to_radius,
  ):
    for parameter in inspect.signature(factory).parameters.values():
      assert parameter.kind in (
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
      )

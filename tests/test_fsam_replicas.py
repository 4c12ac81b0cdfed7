"""`fsam` on several replicas, and what it checks of its two gradients."""

import by_hand
import chex
import faces
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
import optax
import pytest
from versions import as_varying

import fsam_optax

REPLICAS, RHO, RATE = 4, 0.3, 0.05


def chain(axis_name=None, **kwargs):
  link = fsam_optax.fsam(RHO, axis_name=axis_name, **kwargs)
  return optax.chain(link, optax.sgd(RATE))


def update_of(problem, tx, mean_outside=False):
  """A step whose grad_fn sees the rows of one replica and takes no mean."""

  def update(params, state, batch):
    grad_fn = lambda params: jax.grad(problem.loss_fn)(params, batch)
    grads = grad_fn(params)
    if mean_outside:
      grads = jax.lax.pmean(grads, "batch")
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return update


def mesh_of_replicas():
  return make_mesh(batch=REPLICAS)


def over_pmap(update):
  return jax.pmap(update, axis_name="batch", devices=jax.devices()[:REPLICAS])


def over_vmap(update):
  return jax.jit(jax.vmap(update, axis_name="batch"))


def over_shard_map(update):
  """With JAX's check off, in which every replica has its own gradient."""
  mesh = mesh_of_replicas()
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
  return jax.jit(
    jax.shard_map(
      lambda p, s, b: lead(update(one(p), one(s), one(b))),
      mesh=mesh,
      in_specs=P("batch"),
      out_specs=P("batch"),
      check_vma=False,
    )
  )


def run(problem, step, tx, steps=3):
  tile = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * REPLICAS), tree)
  split = lambda x: x.reshape(REPLICAS, -1, *x.shape[1:])
  params, state = tile(problem.params), tile(tx.init(problem.params))
  for t in range(steps):
    batch = jax.tree.map(split, problem.batch(t))
    params, state = step(params, state, batch)
  return params, state


@pytest.fixture(scope="module")
def one_device(problem):
  """The parameters after each step on the whole batch, without an axis."""
  tx = chain()
  params, state = problem.params, tx.init(problem.params)
  step, after = jax.jit(update_of(problem, tx)), [params]
  for t in range(3):
    params, state = step(params, state, problem.batch(t))
    after.append(params)
  return after


@pytest.mark.parametrize("mapped", [over_pmap, over_vmap, over_shard_map])
def test_with_an_axis_name_replicas_do_what_one_device_does(
  problem, one_device, mapped
):
  tx = chain(axis_name="batch")
  params, state = run(problem, mapped(update_of(problem, tx)), tx)
  for leaf in jax.tree.leaves((params, state)):
    assert (leaf == leaf[:1]).all()
  found = jax.tree.map(lambda x: x[0], params)
  chex.assert_trees_all_close(found, one_device[3], rtol=1e-4, atol=1e-5)


def test_a_mean_outside_is_the_same_and_alone_lets_replicas_drift(
  problem, one_device
):
  tx = chain(axis_name="batch")
  step = over_pmap(update_of(problem, tx, mean_outside=True))
  found = jax.tree.map(lambda x: x[0], run(problem, step, tx)[0])
  chex.assert_trees_all_close(found, one_device[3], rtol=1e-4, atol=1e-5)
  tx = chain()
  params, _ = run(
    problem, over_pmap(update_of(problem, tx, mean_outside=True)), tx
  )
  spread = max(float(jnp.ptp(x, axis=0).max()) for x in jax.tree.leaves(params))
  assert spread > 1e-3


def on_mesh(problem, tx, loss_fn=None, own=None, outside=False, **options):
  """The parameters after one step in a `shard_map`, replicated."""
  loss_fn = loss_fn or problem.loss_fn
  own = own or (lambda params: params)

  def update(params, state, batch):
    grad_fn = lambda params: jax.grad(loss_fn)(own(params), batch)
    grads = grad_fn(params)
    grads = jax.lax.pmean(grads, "batch") if outside else grads
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates)

  specs = dict(in_specs=(P(), P(), P("batch")), out_specs=P())
  mapped = jax.shard_map(update, mesh=mesh_of_replicas(), **specs, **options)
  params = problem.params
  return jax.jit(mapped)(params, tx.init(params), problem.batch(0))


def as_own(params):
  return as_varying(params, "batch")


def test_shard_map_sees_the_drift_before_it_happens(problem, one_device):
  """Where JAX tracks what varies, the second gradient alone still does."""
  with pytest.raises(ValueError, match=r"differs along \['batch'\].*axis_name"):
    on_mesh(problem, chain(), own=as_own, outside=True)
  found = on_mesh(problem, chain("batch"), own=as_own, outside=True)
  chex.assert_trees_all_close(found, one_device[1], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_shard_map_has_summed_is_no_mean_of_replicas(
  problem, one_device
):
  """By its default check JAX sums the gradient of replicated parameters."""
  tx = chain("batch")
  for outside in (False, True):
    with pytest.raises(ValueError, match=r"same along \['batch'\].*check_vma"):
      on_mesh(problem, tx, outside=outside)
  # The remedies that it names.
  mean_inside = lambda p, b: jax.lax.pmean(problem.loss_fn(p, b), "batch")
  for found in (
    on_mesh(problem, chain(), mean_inside, outside=True),
    on_mesh(problem, tx, own=as_own),
    on_mesh(problem, tx, check_vma=False),
  ):
    chex.assert_trees_all_close(found, one_device[1], rtol=1e-4, atol=1e-5)


# checked=True.


def checked_step(problem, scale=1.0, other_rows=False, jit=False):
  tx = chain(checked=True)
  batch = problem.batch(0)
  rows = problem.batch(1) if other_rows else batch

  def step(params, state):
    grads = jax.grad(problem.loss_fn)(params, batch)
    grad_fn = lambda params: jax.tree.map(
      lambda g: scale * g, jax.grad(problem.loss_fn)(params, rows)
    )
    return tx.update(grads, state, params, grad_fn=grad_fn)

  step = jax.jit(step) if jit else step
  updates, _ = step(problem.params, tx.init(problem.params))
  jax.effects_barrier()
  return updates


@pytest.mark.parametrize("fault", [{"scale": 128.0}, {"other_rows": True}])
def test_checked_finds_what_is_no_gradient(problem, fault):
  with pytest.raises(ValueError, match="`updates` must be the gradient"):
    checked_step(problem, **fault)


def over_sharded_arrays(update):
  rows = jax.sharding.NamedSharding(mesh_of_replicas(), P("batch"))
  step = jax.jit(update, in_shardings=(None, None, rows))
  one = lambda tree: jax.tree.map(lambda x: x[0], tree)
  whole = lambda x: x.reshape(-1, *x.shape[2:])
  return lambda p, s, b: step(one(p), one(s), jax.tree.map(whole, b))


@pytest.mark.parametrize(
  "compiled", [jax.vmap, over_sharded_arrays, over_pmap, over_shard_map]
)
def test_checked_ends_in_nan_and_a_sentence_where_it_is_compiled(
  problem, compiled, capfd
):
  """Raised on one device, an error leaves the others to wait for it."""
  tx = chain(checked=True)

  def update(params, state, batch):
    grad_fn = lambda params: jax.grad(problem.loss_fn)(params, batch)
    scaled = jax.tree.map(lambda g: 128.0 * g, grad_fn(params))
    updates, state = tx.update(scaled, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  params, _ = run(problem, compiled(update), tx, steps=1)
  jax.effects_barrier()
  assert all(jnp.isnan(x).all() for x in jax.tree.leaves(params))
  assert "`updates` must be the gradient" in capfd.readouterr().out


@pytest.mark.parametrize("jit", [False, True])
def test_checked_lets_a_right_loop_be(problem, jit):
  tx = chain()
  grad_fn = lambda params: jax.grad(problem.loss_fn)(params, problem.batch(0))
  expected, _ = tx.update(
    grad_fn(problem.params),
    tx.init(problem.params),
    problem.params,
    grad_fn=grad_fn,
  )
  chex.assert_trees_all_close(
    checked_step(problem, jit=jit), expected, rtol=1e-5, atol=1e-7
  )


def test_gradients_of_single_rows_are_refused(problem):
  tx, params = chain(), problem.params
  grads = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
  with pytest.raises(ValueError, match=r"`params`, .*got shape \[8, "):
    tx.update(grads, tx.init(params), params, grad_fn=lambda params: grads)


# The order in the chain, and MultiSteps.


def test_accumulation_behind_fsam_is_a_mean_of_second_gradients(problem):
  """By hand: four pairs of passes at one place, one step with their mean."""
  base = optax.MultiSteps(optax.sgd(RATE), 4).gradient_transformation()
  by_hand_loop = by_hand.ByHand(problem.params, base)
  for t in range(4):
    batch = problem.batch(t)
    by_hand_loop.step(lambda p, b=batch: jax.grad(problem.loss_fn)(p, b))
  (params, *_), _ = faces.train(
    faces.chain,
    problem.loss_fn,
    problem.params,
    jax.tree.map(lambda x: x[:4], problem.batches),
    base,
    fsam_optax.friendly_perturbation(by_hand.RHO, lmbda=by_hand.LMBDA),
  )
  by_hand_loop.assert_followed_by(params)

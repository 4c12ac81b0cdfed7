"""`fsam` on several replicas, and what it checks of its two gradients."""

import chex
import jax
from jax import numpy as jnp
from jax.sharding import PartitionSpec as P
from meshes import make_mesh
import optax
import optax.tree
import pytest

import fsam_optax

REPLICAS, RHO, RATE = 4, 0.3, 0.05


def chain(axis_name=None, **kwargs):
  link = fsam_optax.fsam(RHO, axis_name=axis_name, **kwargs)
  return optax.chain(link, optax.sgd(RATE))


def update_of(loss_fn, tx, outside=False, own=lambda params: params, scale=1.0):
  """A step whose grad_fn sees the rows of one replica and takes no mean."""

  def update(params, state, batch):
    grad_fn = lambda params: jax.grad(loss_fn)(own(params), batch)
    grads = optax.tree.scale(scale, grad_fn(params))
    grads = jax.lax.pmean(grads, "batch") if outside else grads
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), state

  return update


def first(tree):
  return jax.tree.map(lambda x: x[0], tree)


def over_pmap(update):
  return jax.pmap(update, axis_name="batch", devices=jax.devices()[:REPLICAS])


def over_vmap(update):
  return jax.jit(jax.vmap(update, axis_name="batch"))


def over_shard_map(update):
  """With JAX's check off, in which every replica has its own gradient."""
  lead = lambda tree: jax.tree.map(lambda x: x[None], tree)
  return jax.jit(
    jax.shard_map(
      lambda *args: lead(update(*map(first, args))),
      mesh=make_mesh(batch=REPLICAS),
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
  """The parameters by steps on the whole batch, without an axis."""
  return {steps: problem.train(chain(), steps)[0] for steps in (1, 3)}


@pytest.mark.parametrize("mapped", [over_pmap, over_shard_map])
def test_with_an_axis_name_replicas_do_what_one_device_does(
  problem, one_device, mapped
):
  tx = chain(axis_name="batch")
  params, state = run(problem, mapped(update_of(problem.loss_fn, tx)), tx)
  for leaf in jax.tree.leaves((params, state)):
    assert (leaf == leaf[:1]).all()
  found = first(params)
  chex.assert_trees_all_close(found, one_device[3], rtol=1e-4, atol=1e-5)


def test_a_mean_outside_is_the_same_and_alone_lets_replicas_drift(
  problem, one_device
):
  trained = lambda tx: run(
    problem, over_vmap(update_of(problem.loss_fn, tx, outside=True)), tx
  )[0]
  found = first(trained(chain(axis_name="batch")))
  chex.assert_trees_all_close(found, one_device[3], rtol=1e-4, atol=1e-5)
  params = trained(chain())
  spread = max(float(jnp.ptp(x, axis=0).max()) for x in jax.tree.leaves(params))
  assert spread > 1e-3


def on_mesh(problem, tx, loss_fn=None, check_vma=True, **options):
  """The parameters after one step in a `shard_map`, replicated."""
  mapped = jax.shard_map(
    update_of(loss_fn or problem.loss_fn, tx, **options),
    mesh=make_mesh(batch=REPLICAS),
    in_specs=(P(), P(), P("batch")),
    out_specs=P(),
    check_vma=check_vma,
  )
  params = problem.params
  return jax.jit(mapped)(params, tx.init(params), problem.batch(0))[0]


def as_own(params):
  if hasattr(jax.lax, "pcast"):
    return jax.lax.pcast(params, "batch", to="varying")
  return jax.lax.pvary(params, "batch")


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


def updates_of(problem, rows=0, checked=True):
  """Of a loop whose `grad_fn` may be that of another batch."""
  tx, gradient = chain(checked=checked), jax.grad(problem.loss_fn)
  grad_fn = lambda params: gradient(params, problem.batch(rows))
  params, grads = problem.params, gradient(problem.params, problem.batch(0))
  return tx.update(grads, tx.init(params), params, grad_fn=grad_fn)[0]


def test_checked_finds_what_is_no_gradient(problem):
  with pytest.raises(ValueError, match="`updates` must be the gradient"):
    updates_of(problem, rows=1)


def test_checked_lets_a_right_loop_be(problem):
  expected = updates_of(problem, checked=False)
  for run in (lambda fn: fn, jax.jit):
    found = run(lambda: updates_of(problem))()
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)


def over_sharded_arrays(update):
  rows = jax.NamedSharding(make_mesh(batch=REPLICAS), P("batch"))
  step = jax.jit(update, in_shardings=(None, None, rows))
  whole = lambda x: x.reshape(-1, *x.shape[2:])
  return lambda p, s, b: step(first(p), first(s), jax.tree.map(whole, b))


@pytest.mark.parametrize(
  "compiled", [over_vmap, over_sharded_arrays, over_shard_map]
)
def test_checked_ends_in_nan_and_a_sentence_where_it_is_compiled(
  problem, compiled, capfd
):
  """Raised on one device, an error leaves the others to wait for it."""
  tx = chain(checked=True)
  step = compiled(update_of(problem.loss_fn, tx, scale=128.0))
  params, _ = run(problem, step, tx, steps=1)
  jax.effects_barrier()
  assert all(jnp.isnan(x).all() for x in jax.tree.leaves(params))
  assert "`updates` must be the gradient" in capfd.readouterr().out

"""`checked=True` finds a wrong loop, and lets a right one be."""

from faces import state_of
from faces import step_of
import jax
from jax import numpy as jnp
from meshes import make_mesh
import optax
import pytest

import fsam_optax

PERTURBATION = fsam_optax.friendly_perturbation(rho=0.3, lmbda=0.5)
PARAMS = {"w": jnp.eye(3), "b": jnp.ones(3)}
BATCHES = jax.random.normal(jax.random.key(0), (3, 8, 3))
IMPURE = "`loss_fn` must return the same"
APART = "`axis_name` must name 'batch'"
NOT_CARRIED_ON = "state must be carried on"


def loss_of(params, rows):
  return jnp.mean(jnp.tanh(rows @ params["w"] + params["b"]) ** 2)


def impure_loss():
  """A loss that moves at each call; its slope does not."""
  calls = []

  def loss_fn(params, rows):
    calls.append(None)
    return loss_of(params, rows) + len(calls)

  return loss_fn


def value_and_grad(loss_fn=loss_of, **options):
  fn = fsam_optax.value_and_grad(loss_fn, PERTURBATION, checked=True, **options)
  return lambda *args: fn(*args)[:3]


def losses_of(fn, carries_on=True, params=PARAMS):
  """The losses of three steps of one loop."""
  state, losses = PERTURBATION.init(params), []
  for rows in BATCHES:
    loss, _, new_state = fn(params, state, rows)
    state = new_state if carries_on else state
    losses.append(loss)
  jax.effects_barrier()
  return jnp.stack(losses)


FAULTS = {
  IMPURE: lambda fn_of: losses_of(fn_of(value_and_grad(impure_loss()))),
  NOT_CARRIED_ON: lambda fn_of: losses_of(fn_of(value_and_grad()), False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_uncompiled_it_is_an_error(fault):
  with pytest.raises(ValueError, match=fault):
    FAULTS[fault](lambda fn: fn)


def over_rows_on_many_devices(fn):
  rows = jax.sharding.NamedSharding(make_mesh(), jax.P("batch"))
  return jax.jit(fn, in_shardings=(None, None, rows))


def over_seeds(fn):
  twice = lambda tree: jax.tree.map(lambda x: jnp.stack([x, 2 * x]), tree)
  mapped = jax.jit(jax.vmap(fn, in_axes=(0, None, None), out_axes=(0, 0, 0)))

  def call(params, state, rows):
    loss, grads, state = mapped(twice(params), state, rows)
    return loss, grads, jax.tree.map(lambda x: x[0], state)

  return call


COMPILED = [over_rows_on_many_devices, over_seeds]


@pytest.mark.parametrize(
  ("fault", "fn_of"),
  [(IMPURE, jax.jit), *((NOT_CARRIED_ON, fn_of) for fn_of in COMPILED)],
)
def test_compiled_it_is_nan_and_a_sentence(fault, fn_of, capfd):
  assert jnp.isnan(FAULTS[fault](fn_of)[-1]).all()
  assert fault in capfd.readouterr().out


@pytest.mark.parametrize("fn_of", [lambda fn: fn, *COMPILED])
def test_a_right_loop_is_left_alone(fn_of, capfd):
  options = {"num_microbatches": 2, "every": 2, "ema_gradient": "descent"}
  assert jnp.isfinite(losses_of(fn_of(value_and_grad(**options)))).all()
  assert not capfd.readouterr().out


def mapped_by_pmap(fn):
  return jax.pmap(fn, axis_name="batch", in_axes=(None, None, 0))


def mapped_by_vmap(fn):
  return jax.jit(jax.vmap(fn, axis_name="batch", in_axes=(None, None, 0)))


@pytest.mark.parametrize(
  ("mapped", "axis_name"),
  [(mapped_by_pmap, None), (mapped_by_vmap, None), (mapped_by_pmap, "batch")],
)
def test_averages_that_differ_between_replicas_are_found(
  mapped, axis_name, capfd
):
  """The loop takes the mean of the gradients by itself, and not of states."""

  def step(params, state, rows):
    loss, grads, _ = value_and_grad(axis_name=axis_name)(params, state, rows)
    return jax.lax.pmean((loss, grads), "batch")

  rows = BATCHES[0].reshape(4, 2, 3)
  loss, grads = mapped(step)(PARAMS, PERTURBATION.init(PARAMS), rows)
  jax.effects_barrier()
  is_wrong = axis_name is None
  assert jnp.isnan(loss).all() == jnp.isnan(grads["w"]).all() == is_wrong
  assert (APART in capfd.readouterr().out) == is_wrong


@pytest.mark.parametrize("average", ["own", "optimizer"])
def test_a_loss_that_is_not_finite_accuses_no_later_step(average, capfd):
  perturbation = fsam_optax.friendly_perturbation(0.3, average=average)
  state = state_of(PARAMS, perturbation, optax.sgd(0.1, momentum=0.9))
  loss_fn = lambda params, batch: loss_of(params, batch["rows"]) + batch["plus"]
  step = step_of(loss_fn, checked=True, ema_gradient="descent")
  skipped = []
  for plus in (0.0, jnp.nan, 0.0):
    rows = {"rows": BATCHES[0], "plus": jnp.float32(plus)}
    state, metrics = step(state, rows)
    skipped.append(int(metrics["skipped"]))
  jax.effects_barrier()
  assert skipped == [0, 1, 0]
  assert not capfd.readouterr().out


@pytest.mark.parametrize("loss_fn", [loss_of, impure_loss()])
def test_the_train_step_reports_nan_and_steps_no_further(loss_fn, capfd):
  state = state_of(PARAMS, PERTURBATION)
  step = step_of(loss_fn, checked=True, every=2)
  for rows in BATCHES:
    state, metrics = step(state, rows)
  jax.effects_barrier()
  is_wrong = loss_fn is not loss_of
  assert jnp.isnan(metrics["loss"]) == is_wrong
  assert int(state.step) == (0 if is_wrong else 3)
  assert (IMPURE in capfd.readouterr().out) == is_wrong

"""fsam beside and inside the transformations of optax and the loops of flax.

`CLAIMS` is the table of what works with what. Each row has its test below,
under the name of the row.
"""

from by_hand import two_passes
import chex
import faces
from flax.training import train_state
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax

CLAIMS = {
  "chain": (
    "fsam first; what follows sees the sharpness-aware gradient. Clip after it"
  ),
  "an optimizer, clipping or weight decay in front of fsam": (
    "wrong: it ascends, nothing is clipped, decayed or frozen. `checked=True` "
    "raises"
  ),
  "freeze, set_to_zero": (
    "behind `fsam(mask=trained)`: without the mask frozen weights are "
    "perturbed and fill the radius"
  ),
  "pmap, shard_map, vmap": (
    "`axis_name=`, or the mean inside grad_fn, too (under shard_map inside the "
    "loss); that of the loop alone lets replicas drift apart"
  ),
  "inject_hyperparams": (
    "works, schedules included; a callable mask and accumulator_dtype go into "
    "static_args"
  ),
  "unknown extra args": (
    "are accepted, and reach the other members of the chain"
  ),
  "masked, partition, multi_transform": (
    "around a chain that holds fsam: a ValueError that names the remedy"
  ),
  "MultiSteps": (
    "around fsam the descent drops all micro-batches but the last; behind it, "
    "`chain(fsam(), MultiSteps(base, k))`, each ascends alone and all count"
  ),
  "apply_if_finite": (
    "around the base optimizer; around the chain it tests only the first "
    "gradient"
  ),
  "lookahead": "takes no extra args: use the two-pass value_and_grad",
  "flatten, split_real_and_imaginary": (
    "behind fsam: `chain(fsam(), flatten(base))`; around it they are errors. "
    "Complex gradients are conjugated between the two"
  ),
  "lbfgs": (
    "behind fsam, with `value_fn=lambda p, grad_fn: loss(p)`: its line search "
    "goes by the clean loss"
  ),
  "schedule_free, reduce_on_plateau, conditionally_transform": "work",
  "tree.map_params, None leaves": "work",
  "nnx.Optimizer": "update(model, grads, grad_fn=f) forwards it",
  "optimizers that read the value or keep the parameters": (
    "polyak_sgd, momo, prodigy, dog, mechanize: the train step hands on the "
    "clean loss and copies what aliases"
  ),
  "linen TrainState": (
    "flax's apply_gradients does not forward grad_fn: use fsam_optax.TrainState"
  ),
}
ROWS = [*CLAIMS.items()]
# Rows that another file tests: test_fsam_replicas.py and test_golden.py.
_tested = {"chain", "pmap, shard_map, vmap", "nnx.Optimizer"}


def row(name):
  """Ties a test to its row of the table."""
  assert name in CLAIMS, f"no row {name!r}"
  _tested.add(name)
  return lambda test: test


def first_update(tx, params, grad_fn, **extra):
  """What the first update of a chain returns, and the state after it."""
  return tx.update(
    grad_fn(params), tx.init(params), params, grad_fn=grad_fn, **extra
  )


@row("inject_hyperparams")
def test_injected_schedules_are_those_of_the_factory(problem):
  """Beside a callable mask and a dtype, which are static."""
  schedules = {
    "rho": optax.linear_schedule(0.0, 0.3, 20),
    "sigma": optax.cosine_decay_schedule(1.0, 25),
    "lmbda": optax.linear_schedule(0.5, 0.99, 30),
  }
  static = {
    "mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    "accumulator_dtype": jnp.bfloat16,
  }
  injected = optax.inject_hyperparams(fsam_optax.fsam, static_args=[*static])
  own, (found, state) = (
    problem.train(optax.chain(make(**schedules, **static), optax.sgd(0.05)))
    for make in (fsam_optax.fsam, injected)
  )
  chex.assert_trees_all_close(found, own[0], rtol=1e-3, atol=1e-4)
  inner = state[0].inner_state
  chex.assert_trees_all_equal_shapes_and_dtypes(inner, own[1][0])
  last = len(problem.batches[0]) - 1
  assert set(state[0].hyperparams) == {*schedules, "eta"}
  for name, schedule in schedules.items():
    np.testing.assert_allclose(
      state[0].hyperparams[name], schedule(last), rtol=1e-5, atol=1e-7
    )


@row("unknown extra args")
def test_other_members_of_the_chain_get_their_extra_args(problem):
  """And `grad_fn` runs once."""
  received, calls = [], []

  def update_fn(updates, state, params=None, *, value, **extra_args):
    received.append((value, sorted(extra_args)))
    return updates, state

  needy = optax.GradientTransformationExtraArgs(
    lambda _: optax.EmptyState(), update_fn
  )
  tx = optax.chain(needy, fsam_optax.fsam(), needy, optax.sgd(0.1))
  params = problem.params
  grad_fn = lambda p: (calls.append(p), p)[1]
  tx.update(params, tx.init(params), params, grad_fn=grad_fn, value=3, other=4)
  assert received == [(3, ["grad_fn", "other"])] * 2
  assert len(calls) == 1


CUT = {  # `multi_transform` is the old name of `partition`.
  "masked": lambda tx: optax.masked(tx, {"hidden": True, "output": False}),
  "partition": lambda tx: optax.partition(
    {"sharp": tx, "plain": optax.sgd(0.1)},
    {"hidden": "sharp", "output": "plain"},
  ),
}


@row("masked, partition, multi_transform")
@pytest.mark.parametrize("wrapper", CUT)
def test_a_wrapper_that_cuts_parameters_is_an_error_with_its_remedy(
  problem, wrapper
):
  tx = CUT[wrapper](optax.chain(fsam_optax.fsam(), optax.sgd(0.1)))
  remedy = r"got masked nodes.*mask=.*value_and_gr"
  with pytest.raises(ValueError, match=remedy):
    first_update(tx, problem.params, lambda params: params)


@row("MultiSteps")
def test_multi_steps_ascends_and_descends_on_the_last_micro_batch(problem):
  """Its direction is of the mean gradient, but grad_fn is the last call's."""
  fsam = fsam_optax.fsam(0.1)
  tx = optax.MultiSteps(optax.chain(fsam, optax.sgd(1.0)), every_k_schedule=2)
  found, state = problem.train(tx, steps=2)
  params = problem.params
  mean = jax.tree.map(lambda x, y: (x + y) / 2, *problem.gradients(2))
  of_last = lambda p: jax.grad(problem.loss_fn)(p, problem.batch(1))
  last, _ = fsam.update(mean, fsam.init(params), params, grad_fn=of_last)
  chex.assert_trees_all_close(
    found, optax.tree.sub(params, last), rtol=1e-4, atol=1e-5
  )
  (ema,) = optax.tree.get_all_with_path(state, "ema")
  chex.assert_trees_all_close(ema[1], mean, rtol=1e-5, atol=1e-6)


@row("MultiSteps")
def test_accumulation_behind_fsam_is_a_mean_of_second_gradients(problem):
  """By hand: four pairs of passes at one place, one step with their mean."""
  base = optax.MultiSteps(optax.sgd(0.05), 4).gradient_transformation()
  found, _ = problem.train(optax.chain(fsam_optax.fsam(0.3), base), steps=4)
  perturbation, params = fsam_optax.friendly_perturbation(0.3), problem.params
  expected, ascent = params, perturbation.init(params)
  for t in range(4):
    _, (_, second), ascent = two_passes(
      problem.loss_fn, perturbation, ascent, params, problem.batch(t)
    )
    expected = optax.tree.add_scale(expected, -0.05 / 4, second)
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


@row("apply_if_finite")
def test_apply_if_finite_around_the_base_sees_the_second_gradient():
  params = jnp.array([1.0, 2.0])
  # Finite at the clean parameters alone.
  grad_fn = lambda p: jnp.where(p == params, 1.0, jnp.nan)
  update = lambda tx: first_update(tx, params, grad_fn)
  fsam, adam = fsam_optax.fsam(0.1), optax.adam(0.1)
  updates, (_, state) = update(
    optax.chain(fsam, optax.apply_if_finite(adam, 5))
  )
  assert not updates.any()
  chex.assert_trees_all_equal(state.inner_state, adam.init(params))
  assert state.total_notfinite == 1
  # Around the chain it misses it.
  updates, state = update(optax.apply_if_finite(optax.chain(fsam, adam), 5))
  assert jnp.isnan(updates).all()
  assert state.total_notfinite == 0


@row("lookahead")
def test_lookahead_refuses_grad_fn(problem):
  tx = optax.lookahead(
    optax.chain(fsam_optax.fsam(), optax.sgd(0.1)), 5, slow_step_size=0.5
  )
  params = optax.LookaheadParams.init_synced(problem.params)
  with pytest.raises(TypeError, match="unexpected keyword argument 'grad_fn'"):
    tx.update(problem.params, tx.init(params), params, grad_fn=lambda p: p)


@row("flatten, split_real_and_imaginary")
def test_flatten_and_split_work_behind_and_are_refused_around(problem):
  batch, params, fsam = problem.batch(0), problem.params, fsam_optax.fsam(0.1)
  grad_fn = jax.jit(lambda p: jax.grad(problem.loss_fn)(p, batch))
  second = lambda tx: first_update(tx, params, grad_fn)[0]
  sgd, expected = optax.sgd(0.1), second(optax.chain(fsam, optax.sgd(0.1)))
  split = optax.contrib.split_real_and_imaginary
  for wrapper in (optax.flatten, split):
    found = second(optax.chain(fsam, wrapper(sgd)))
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
  flat = optax.flatten(fsam_optax.friendly_perturbation(0.1))
  loss_fn = lambda p, _: problem.loss_fn(p, batch)
  fn = fsam_optax.value_and_grad(loss_fn, flat)
  _, grads, state, info = fn(params, flat.init(params), None)
  np.testing.assert_allclose(info.gradient_ema_cosine, 0)  # Of no average yet.
  _, _, _, info = fn(params, state, None)
  np.testing.assert_allclose(info.gradient_ema_cosine, 1, rtol=1e-5)
  found = jax.tree.map(lambda g: -0.1 * g, grads)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-7)
  with pytest.raises(TypeError, match="`grad_fn` a vector of 24 entries"):
    second(optax.flatten(optax.chain(fsam, sgd)))
  with pytest.raises(TypeError, match="unexpected keyword argument 'grad_fn'"):
    second(split(optax.chain(fsam, sgd)))


@row("flatten, split_real_and_imaginary")
def test_complex_parameters_train_as_pairs_of_real_ones():
  away = lambda z: jnp.sum(jnp.abs(z - 1j) ** 4)
  conjugate = optax.stateless(lambda u, p: jax.tree.map(jnp.conj, u))
  split = optax.contrib.split_real_and_imaginary(optax.adam(0.1))
  z = jnp.array([1 + 2j, -3 + 0.5j], jnp.complex64)
  pair = {"re": z.real, "im": z.imag}
  of_pair = lambda p: away(p["re"] + 1j * p["im"])

  def trained(loss_fn, params, tx):
    (params, *_), _ = faces.train(
      faces.chain,
      lambda params, batch: loss_fn(params),
      params,
      jnp.zeros(3),  # Three steps.
      tx,
      fsam_optax.friendly_perturbation(0.3, lmbda=0.5),
    )
    return params

  found = trained(away, z, optax.chain(conjugate, split))
  expected = trained(of_pair, pair, optax.adam(0.1))
  np.testing.assert_allclose(found.real, expected["re"], rtol=1e-5)
  np.testing.assert_allclose(found.imag, expected["im"], rtol=1e-5)


@row("lbfgs")
def test_lbfgs_searches_along_the_sharpness_aware_gradient(problem):
  batch, params = problem.batch(0), problem.params
  loss_fn = jax.jit(lambda p: problem.loss_fn(p, batch))
  loss, grads = jax.value_and_grad(loss_fn)(params)
  fsam, grad_fn = fsam_optax.fsam(0.1), jax.grad(loss_fn)
  tx = optax.chain(fsam, optax.lbfgs())
  update = lambda value_fn: first_update(
    tx, params, grad_fn, value=loss, grad=grads, value_fn=value_fn
  )[0]
  if not optax.__version__.startswith("0.2.5"):  # That leaves `grad_fn` out.
    with pytest.raises(TypeError, match="accepted by `value_fn`"):
      update(loss_fn)
  updates = jax.jit(lambda: update(lambda p, grad_fn: loss_fn(p)))()
  # Its first step is the steepest descent, scaled.
  second, _ = first_update(fsam, params, grad_fn)
  cosine = -optax.tree.vdot(updates, second) / (
    optax.tree.norm(updates) * optax.tree.norm(second)
  )
  np.testing.assert_allclose(cosine, 1, rtol=1e-5)
  assert loss_fn(optax.apply_updates(params, updates)) < loss


@row("schedule_free, reduce_on_plateau, conditionally_transform")
def test_schedule_free_trains_behind_fsam_and_around_it(problem):
  inside = optax.contrib.schedule_free(
    optax.chain(fsam_optax.fsam(0.05), optax.sgd(0.05)), learning_rate=0.05
  )
  behind = optax.chain(
    fsam_optax.fsam(0.05),
    optax.contrib.schedule_free(optax.sgd(0.05), learning_rate=0.05),
  )
  params, state = problem.train(inside)
  behind_params, behind_state = problem.train(behind)
  averages_of = optax.contrib.schedule_free_eval_params
  chex.assert_trees_all_close(
    (params, averages_of(state, params)),
    (behind_params, averages_of(behind_state[1], behind_params)),
    rtol=1e-4,
    atol=1e-5,
  )


@row("schedule_free, reduce_on_plateau, conditionally_transform")
def test_reduce_on_plateau_reads_the_value_behind_fsam(problem):
  tx = optax.chain(
    fsam_optax.fsam(0.05),
    optax.sgd(0.05),
    optax.contrib.reduce_on_plateau(
      factor=0.5, patience=1, accumulation_size=1
    ),
  )
  _, state = problem.train(tx, value=jnp.float32(1.0))
  assert state[-1].scale < 1e-3


@row("schedule_free, reduce_on_plateau, conditionally_transform")
def test_conditionally_transform_gates_fsam(problem):
  every_other = optax.conditionally_transform(
    fsam_optax.fsam(0.3), lambda step: step % 2 == 0
  )
  params, batch = problem.params, problem.batch(0)
  grad_fn = jax.jit(lambda p: jax.grad(problem.loss_fn)(p, batch))
  gradient, state = grad_fn(params), every_other.init(params)
  update = jax.jit(
    lambda s: every_other.update(gradient, s, params, grad_fn=grad_fn)
  )
  sharp, state = update(state)
  plain, state = update(state)
  chex.assert_trees_all_close(plain, gradient, rtol=1e-6)
  assert optax.tree.norm(optax.tree.sub(sharp, gradient)) > 1e-2
  assert state.inner_state[0].count == 1


@row("tree.map_params, None leaves")
@pytest.mark.parametrize(
  "mask", [None, {"w": True, "frozen": None, "b": False}]
)
def test_none_leaves_stay_none(mask):
  params = {"w": jnp.array([3.0, 4.0]), "frozen": None, "b": jnp.ones(1)}
  tx = fsam_optax.fsam(0.1, mask=mask)
  updates, state = first_update(tx, params, lambda params: params)
  assert updates["frozen"] is None
  chex.assert_tree_all_finite((updates, state))


@row("linen TrainState")
def test_apply_gradients_of_flax_does_not_forward_grad_fn(problem):
  state = train_state.TrainState.create(
    apply_fn=None,
    params=problem.params,
    tx=optax.chain(fsam_optax.fsam(), optax.sgd(0.1)),
  )
  for extra in ({}, {"grad_fn": lambda p: p}):
    with pytest.raises(ValueError, match="`grad_fn` must be given, got None"):
      state.apply_gradients(grads=problem.params, **extra)


@row("an optimizer, clipping or weight decay in front of fsam")
def test_what_stands_in_front_of_fsam_is_lost(problem):
  """The first update is the second gradient alone, at the end of an ascent."""
  params, batch = problem.params, problem.batch(0)
  front = optax.add_decayed_weights(10.0)
  grad_fn = lambda p: jax.grad(problem.loss_fn)(p, batch)
  tx = optax.chain(front, fsam_optax.fsam(0.1))
  updates, _ = first_update(tx, params, grad_fn)
  changed, _ = front.update(grad_fn(params), front.init(params), params)
  length = optax.tree.norm(changed)
  perturbed = jax.tree.map(lambda w, c: w + 0.1 * c / length, params, changed)
  chex.assert_trees_all_close(updates, grad_fn(perturbed), rtol=1e-4)
  checked = optax.chain(front, fsam_optax.fsam(0.1, checked=True))
  with pytest.raises(ValueError, match="Put `fsam` first"):
    first_update(checked, params, grad_fn)


@row("freeze, set_to_zero")
def test_frozen_weights_do_not_fill_the_radius_behind_a_mask(problem):
  """As if the trained weights were all there is."""
  labels = {"hidden": "frozen", "output": "trained"}
  base = optax.partition(
    {"frozen": optax.set_to_zero(), "trained": optax.sgd(0.05)}, labels
  )
  mask = {"hidden": False, "output": True}
  found, _ = problem.train(optax.chain(fsam_optax.fsam(0.1, mask=mask), base))
  hidden = problem.params["hidden"]
  alone = problem._replace(
    params={"output": problem.params["output"]},
    loss_fn=lambda p, batch: problem.loss_fn({"hidden": hidden, **p}, batch),
  )
  expected, _ = alone.train(optax.chain(fsam_optax.fsam(0.1), optax.sgd(0.05)))
  chex.assert_trees_all_equal(found["hidden"], hidden)
  chex.assert_trees_all_close(found["output"], expected["output"], rtol=1e-4)
  unmasked, _ = problem.train(optax.chain(fsam_optax.fsam(0.1), base))
  assert float(jnp.abs(unmasked["output"] - found["output"]).max()) > 1e-4


@row("optimizers that read the value or keep the parameters")
@pytest.mark.parametrize("make", [optax.polyak_sgd, optax.contrib.prodigy])
def test_the_train_step_gives_optimizers_what_they_ask_for(problem, make):
  """Against the same optimizer fed by hand with loss and gradient."""
  tx, perturbation = make(0.05), fsam_optax.friendly_perturbation(0.1)
  step = faces.step_of(problem.loss_fn)
  state = faces.state_of(problem.params, perturbation, tx)
  params, opt_state = problem.params, tx.init(problem.params)
  ascent = perturbation.init(params)
  update = optax.with_extra_args_support(tx).update
  for t in range(3):
    batch = problem.batch(t)
    (loss, _), (_, second), ascent = two_passes(
      problem.loss_fn, perturbation, ascent, params, batch
    )
    updates, opt_state = update(second, opt_state, params, value=loss)
    params = optax.apply_updates(params, updates)
    state, _ = step(state, batch)
  chex.assert_trees_all_close(state.params, params, rtol=1e-4, atol=1e-5)


def test_every_row_has_its_test():
  assert _tested == set(CLAIMS)

"""The train state: what it carries, copies and refuses."""

import dataclasses
from typing import Any

import chex
from faces import state_of
from faces import step_of
import flax
from flax.training import dynamic_scale as dynamic_scale_lib
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax
from fsam_optax import sharding

RHO, RATE = 0.1, 0.05
# One of each, and one step, for the states to share what is compiled.
PERTURBATION = fsam_optax.friendly_perturbation(rho=RHO)
SGD = optax.sgd(RATE)


def make_state(problem, tx=SGD, perturbation=PERTURBATION, **fields):
  return state_of(problem.params, perturbation, tx, **fields)


@pytest.fixture(scope="module")
def step(problem):
  return step_of(problem.loss_fn)


def test_gradients_of_two_passes_are_taken_with_their_state(problem, step):
  state, expected = make_state(problem), make_state(problem)
  fn = fsam_optax.value_and_grad(problem.loss_fn, state.perturbation)
  _, grads, perturbation_state, _ = fn(
    state.params, state.perturbation_state, problem.batch(0)
  )
  state = state.apply_gradients(
    grads=grads, perturbation_state=perturbation_state
  )
  expected, _ = step(expected, problem.batch(0))
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)
  assert int(state.step) == 1


def test_a_chain_with_fsam_gets_its_grad_fn(problem, step):
  tx = optax.chain(fsam_optax.fsam(rho=RHO), SGD)
  state = make_state(problem, tx, perturbation=None)
  batch = problem.batch(0)
  grad_fn = lambda params: jax.grad(problem.loss_fn)(params, batch)
  grads = grad_fn(state.params)
  state = state.apply_gradients(grads=grads, grad_fn=grad_fn)
  expected, _ = step(make_state(problem), batch)
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5)


def test_metrics_reach_the_optimizer_by_name(problem, step):
  """A base optimizer whose rate is the metric `temperature` of the loss."""

  def update(updates, state, params=None, *, temperature, **extra):
    del params, extra
    return jax.tree.map(lambda g: -temperature * g, updates), state

  def loss_fn(params, batch):
    return problem.loss_fn(params, batch), {"temperature": jnp.float32(RATE)}

  tx = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
  handing_on = step_of(loss_fn, has_aux=True, extra_args=("temperature",))
  state, _ = handing_on(make_state(problem, tx), problem.batch(0))
  expected, _ = step(make_state(problem), problem.batch(0))
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
  wrong = step_of(loss_fn, has_aux=True, extra_args=("heat",))
  with pytest.raises(ValueError, match=r"extra_args.*'temperature'.*'heat'"):
    wrong(make_state(problem, tx), problem.batch(0))


class WithAverage(fsam_optax.TrainState):
  """With a field as flax's own examples declare one: without a default.

  The parameters' average, which many loops add, begins as they are.
  """

  average: Any


@pytest.mark.parametrize("name", ["mechanize", "field", "model state"])
def test_no_buffer_is_donated_twice(problem, step, name):
  """Not what an optimizer keeps of the parameters, nor a field of the state."""
  params = jax.tree.map(jnp.copy, problem.params)
  state = WithAverage.create(
    apply_fn=None,
    params=params,
    tx=optax.contrib.mechanize(SGD) if name == "mechanize" else SGD,
    perturbation=PERTURBATION,
    model_state={"reference": params} if name == "model state" else None,
    average=params if name == "field" else None,
  )
  for t in range(2):
    state, metrics = step(state, problem.batch(t))
  assert np.isfinite(metrics["loss"])
  if name == "field":
    chex.assert_trees_all_equal(state.average, problem.params)


def test_placing_copies_what_was_aliased_after_creation(problem, step):
  state = make_state(problem)
  state = state.replace(model_state={"reference": state.params})
  state = sharding.place_state(state, make_mesh())
  state, _ = step(state, problem.batch(0))
  chex.assert_trees_all_equal(state.model_state["reference"], problem.params)


def test_a_dict_comes_back_for_a_frozen_dict(problem):
  def loss_fn(params, model_state, batch, rng):
    loss = problem.loss_fn(params, batch)
    moved = {"stats": {"mean": model_state["stats"]["mean"] + 1.0}}
    return loss, (moved, {})

  model_state = flax.core.freeze({"stats": {"mean": jnp.zeros(2)}})
  state = make_state(problem, model_state=model_state)
  step = fsam_optax.make_train_step(loss_fn, num_microbatches=2)
  for t in range(2):
    state, _ = step(state, problem.batch(t))
  assert isinstance(state.model_state, flax.core.FrozenDict)
  np.testing.assert_array_equal(
    state.model_state["stats"]["mean"], np.full(2, 2.0 * 2)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Incomparable:
  """A user's container, whose `==` means nothing."""

  x: jax.Array

  def __eq__(self, other):
    raise AssertionError("nobody asks whether two of these are equal")

  __hash__ = None


def test_containers_are_never_compared_by_their_own_equality(problem):
  def loss_fn(params, model_state, batch, rng):
    loss = problem.loss_fn(params, batch)
    return loss, (Incomparable(model_state.x + 1), {})

  state = make_state(problem, model_state=Incomparable(jnp.zeros(3)))
  step = fsam_optax.make_train_step(
    loss_fn, num_microbatches=2, ascent_fraction=0.5, every=2, jit=False
  )
  state, _ = jax.jit(step)(state, problem.batch(0))
  np.testing.assert_array_equal(state.model_state.x, np.full(3, 2.0))


def test_names_that_join_to_one_stay_two_and_a_wide_count_stays_wide(x64):
  wide = jnp.int64(3_000_000_000)
  model_state = {"a/b": {"c": 1.0}, "a": {"b/c": 2.0}, "seen": wide}
  step = step_of(
    lambda params, _: jnp.sum(params["w"]), axis_name="batch", jit=False
  )
  state = state_of({"w": jnp.ones(2)}, PERTURBATION, model_state=model_state)
  rows = {"x": jnp.ones(2), "without columns": jnp.ones((2, 0))}
  state, _ = sharding.group_step(step, 2)(state, rows)
  assert state.model_state == model_state


@flax.struct.dataclass
class Line:
  slope: jax.Array
  offset: jax.Array


def test_parameters_in_a_class_are_those_in_a_dict():
  loss_fn = lambda of: of["slope"] * 3 + jnp.sum(of["offset"] ** 2)
  params = {"slope": jnp.float32(1.0), "offset": jnp.ones(2)}
  in_dict, _ = step_of(lambda params, _: loss_fn(params))(
    state_of(params, PERTURBATION), 0.0
  )
  in_class, _ = step_of(lambda params, _: loss_fn(vars(params)))(
    state_of(Line(**params), PERTURBATION), 0.0
  )
  chex.assert_trees_all_equal(vars(in_class.params), in_dict.params)


def test_an_empty_array_among_others_is_no_empty_batch(problem, step):
  """A batch of graphs of which none has an edge."""
  of_graphs = step_of(
    lambda p, graphs: problem.loss_fn(p, graphs[0]) + jnp.sum(graphs[1])
  )
  batch = problem.batch(0)
  state, _ = of_graphs(make_state(problem), (batch, jnp.zeros((0, 2))))
  expected, _ = step(make_state(problem), batch)
  chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)


def test_float16_parameters_keep_their_optimizer_states_types(problem):
  half = problem._replace(params=optax.tree.cast(problem.params, jnp.float16))
  scale = dynamic_scale_lib.DynamicScale(scale=8.0)
  state = make_state(half, optax.adam(RATE), dynamic_scale=scale)
  types = jax.tree.map(jax.typeof, state)
  step = step_of(half.loss_fn)
  for _ in range(2):
    state, metrics = step(state, problem.batch(0))
    assert metrics["skipped"] == 0
  assert jax.tree.map(jax.typeof, state) == types


def test_a_state_on_many_devices_that_a_step_took_is_named(problem):
  """Of such a state JAX would end the process."""
  mesh, batch = make_mesh(batch=4), problem.batch(0)
  state = sharding.place_state(make_state(problem), mesh)
  step = step_of(problem.loss_fn)
  step(state, batch)
  with pytest.raises(ValueError, match=r"an earlier step took at \['state'\]"):
    step(state, batch)


@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=str)
def test_a_compiled_step_may_be_traced(problem, options):
  step, state = step_of(problem.loss_fn, **options), make_state(problem)
  batches = jax.tree.map(lambda *x: jnp.stack(x), *map(problem.batch, range(2)))
  shapes, _ = jax.eval_shape(step, state, problem.batch(0))
  scanned, _ = jax.lax.scan(step, state, batches)
  chex.assert_trees_all_equal_shapes_and_dtypes(shapes, scanned)
  for i in range(2):
    state, _ = step(state, problem.batch(i))
  chex.assert_trees_all_close(scanned.params, state.params, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"every": 2}], ids=str)
def test_an_array_that_a_step_took_is_named(problem, options):
  state = make_state(problem)
  step = step_of(problem.loss_fn, **options)
  after, _ = step(state, problem.batch(0))
  with pytest.raises(ValueError, match=r"an earlier step took at \['state'\]"):
    step(state, problem.batch(0))
  # An average that began as the parameters, in a field of the state.
  begun = after.replace(model_state=after.params)
  with pytest.raises(ValueError, match=r"one of the state at .*\.params"):
    step(begun, problem.batch(0))
  step(after, problem.batch(0))  # And nothing was lost.

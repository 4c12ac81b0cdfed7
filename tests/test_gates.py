"""Gates: at which steps the ascent runs, and what it costs at the others."""

from by_hand import assert_close
from faces import state_of
from faces import step_of
from flax.training import dynamic_scale as dynamic_scale_lib
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

STEPS = 9
# One object each, so that the states share the compiled steps.
OPTIMIZER = optax.sgd(0.1, momentum=0.9)
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.5, lmbda=0.5)


def train(options, on_host=False, steps=STEPS):
  """Evaluations and perturbation norms by step, and the states of the ascent.

  The weights stay, so that what the ascents do to the averages compares.
  """
  calls = []

  def loss_fn(params, batch):
    jax.debug.callback(lambda: calls.append(None))
    return jnp.sum((params["w"] - batch) ** 2)

  step = step_of(loss_fn, jit=on_host, **options)
  step = step if on_host else jax.jit(step)
  state = state_of({"w": jnp.arange(3.0)}, PERTURBATION, optax.set_to_zero())
  evaluations, norms = [], []
  for i in range(steps):
    # Batches that differ: of equal gradients the average leaves nothing.
    state, metrics = step(state, jnp.full(3, float(i**2)))
    norms.append(float(metrics["perturbation_norm"]))
    jax.effects_barrier()
    evaluations.append(len(calls))
    calls.clear()
  return evaluations, norms, state.perturbation_state


ALL_GATES = {"every": 2, "start": 1, "stop": 6}


@pytest.mark.parametrize(
  ("on_host", "options", "ascends"),
  [(False, {"every": 3}, [0, 3, 6]), (True, ALL_GATES, [1, 3, 5])],
  ids=["graph", "host"],
)
def test_the_second_pass_runs_where_the_gates_are_open(
  on_host, options, ascends
):
  evaluations, norms, _ = train(options, on_host)
  # An evaluation is a forward pass: one a pass.
  expected = [2 if i in ascends else 1 for i in range(STEPS)]
  assert evaluations == expected
  np.testing.assert_allclose(
    norms, [0.5 if i in ascends else 0.0 for i in range(STEPS)], rtol=1e-6
  )


def test_the_average_and_the_schedules_move_at_every_step():
  (gated, radius), (always, _) = (
    train(options)[2] for options in ({"every": 4}, {})
  )
  np.testing.assert_array_equal(gated.ema["w"], always.ema["w"])
  assert int(gated.count) == int(radius.count) == STEPS


@pytest.mark.parametrize("sync", [True, False])
def test_of_a_step_in_parts_the_gates_and_the_schedules_count_one(sync):
  options = {"every": 2, "num_microbatches": 3, "sync_perturbation": sync}
  evaluations, norms, (average, radius) = train(options, steps=4)
  assert evaluations == [6, 3, 6, 3]
  np.testing.assert_allclose(norms, [0.5, 0.0, 0.5, 0.0], rtol=1e-6)
  assert int(average.count) == int(radius.count) == 4


# Compiled by `make_train_step`: two steps, between which the host picks.


def loss_fn(params, batch):
  return jnp.sum(jnp.tanh(params["w"] @ batch) ** 2)


def make_state(size=3, step=0):
  state = state_of({"w": jnp.eye(size)}, PERTURBATION, OPTIMIZER)
  return state.replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def batches():
  return jax.random.normal(jax.random.key(0), (STEPS, 3))


@pytest.fixture(scope="module")
def on_host():
  return step_of(loss_fn, **ALL_GATES)


@pytest.fixture(scope="module")
def in_graph(platform):
  del platform
  return jax.jit(step_of(loss_fn, jit=False, **ALL_GATES))


def test_the_host_picks_the_steps_that_the_graph_does(
  on_host, in_graph, batches
):
  """And inside a scan, which the host does not see, the graph does."""
  state, expected = make_state(), make_state()
  for i, batch in enumerate(batches):
    state, metrics = on_host(state, batch)
    expected, expected_metrics = in_graph(expected, batch)
    assert_close(metrics, expected_metrics, 1e-6)
    # Between the steps that ascend there is one loss.
    assert (metrics["sharpness"] == 0) == (i not in (1, 3, 5))
  scan = jax.jit(lambda state: jax.lax.scan(on_host, state, batches)[0])
  for found in (state, scan(make_state())):
    assert_close(found, expected, 1e-6)


def test_two_runs_in_turn_keep_their_own_count(on_host, batches):
  # The second goes on where another was interrupted.
  states = [make_state(step=0), make_state(step=1)]
  norms = []
  for batch in batches[:4]:
    for i, state in enumerate(states):
      states[i], metrics = on_host(state, batch)
      norms.append(float(metrics["perturbation_norm"]))
  np.testing.assert_allclose(norms, [0, 0.5, 0.5, 0, 0, 0.5, 0.5, 0], rtol=1e-5)


def test_what_the_step_is_lowered_to_is_right_at_every_step(
  on_host, in_graph, batches
):
  compiled = on_host.lower(make_state(), batches[0]).compile()
  for step in (0, 1):
    _, metrics = compiled(make_state(step=step), batches[0])
    _, expected = in_graph(make_state(step=step), batches[0])
    assert_close(metrics, expected, 1e-6)


def test_in_the_graph_a_narrow_loss_gets_narrow_weights(platform):
  del platform
  # Whose gradients are of float32.
  scale = dynamic_scale_lib.DynamicScale()
  narrow = {"w": jnp.eye(3, dtype=jnp.bfloat16)}
  state = state_of(narrow, PERTURBATION, OPTIMIZER, dynamic_scale=scale)
  seen = []

  def narrow_loss(params, batch):
    seen.append(params["w"].dtype)
    return loss_fn(params, batch)

  step = step_of(narrow_loss, jit=False, every=2)
  jax.jit(step)(state, jnp.ones(3, jnp.bfloat16))
  assert set(seen) == {jnp.dtype("bfloat16")}


def test_neither_step_holds_the_memory_of_the_other():
  batch, state = jnp.ones((128, 8)), make_state(128)

  def memory(**options):
    step = jax.jit(step_of(loss_fn, jit=False, **options), donate_argnums=0)
    compiled = step.lower(state, batch).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert memory() <= memory(every=2)
  assert memory(stop=0) < memory(every=2)


def test_no_perturbation_traces_one_pass():
  calls = []
  step = step_of(lambda p, b: (calls.append(None), jnp.sum(p["w"] * b))[1])
  step(state_of({"w": jnp.ones(2)}, None), jnp.ones(2))
  assert len(calls) == 1

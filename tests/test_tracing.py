"""The loss is traced once for both passes, and uncompiled nothing compiles."""

import gc
import weakref

from by_hand import assert_near
from by_hand import two_passes
from faces import state_of
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

PERTURBATION = fsam_optax.friendly_perturbation(rho=0.3)
PARAMS = {"w": jnp.eye(3), "b": jnp.ones(3)}
ROWS = jax.random.normal(jax.random.key(0), (8, 3))


def loss_of(params, rows):
  return jnp.mean(jnp.tanh(rows @ params["w"] + params["b"]) ** 2)


def generator_of_keys():
  """From a key that splits itself, as those of EasyLM do."""
  key = jax.random.key(1)
  while True:
    key, drawn = jax.random.split(key)
    yield drawn


def call(loss_fn, batch=ROWS, params=PARAMS, jit=False, **options):
  fn = fsam_optax.value_and_grad(loss_fn, PERTURBATION, **options)
  fn = jax.jit(fn) if jit else fn
  return fn(params, PERTURBATION.init(params), batch)


def assert_by_hand(found, loss_fn, batch=ROWS):
  """That loss and gradient are those of a pure loss."""
  (loss, _), (_, grads), _ = two_passes(
    loss_fn, PERTURBATION, PERTURBATION.init(PARAMS), PARAMS, batch
  )
  assert_near(found[:2], (loss, grads), 1e-5)


@pytest.mark.parametrize(("jit", "num_microbatches"), [(False, 1), (True, 2)])
def test_what_the_loss_draws_or_pops_is_drawn_or_popped_once(
  jit, num_microbatches
):
  keys = generator_of_keys()

  def impure(params, batch):
    rows, targets = batch["rows"], batch.pop("targets")
    kept = jax.random.bernoulli(next(keys), 0.5, (3,))
    return loss_of(params, rows * kept) + jnp.mean(targets) * params["b"][0]

  kept = jax.random.bernoulli(next(generator_of_keys()), 0.5, (3,))
  pure = lambda params, batch: (
    loss_of(params, batch["rows"] * kept)
    + jnp.mean(batch["targets"]) * params["b"][0]
  )
  batch = {"rows": ROWS, "targets": jnp.arange(8.0)}
  found = call(impure, batch, jit=jit, num_microbatches=num_microbatches)
  assert_by_hand(found, pure, batch)
  assert set(batch) == {"rows", "targets"}


def test_of_fewer_rows_the_loss_is_another_trace_and_pops_again():
  def pops(params, batch):
    return loss_of(params, batch.pop("rows"))

  found = call(pops, {"rows": ROWS}, ascent_fraction=0.5)
  np.testing.assert_allclose(found[0], loss_of(PARAMS, ROWS[::2]), rtol=1e-6)


@pytest.mark.parametrize(
  ("num_microbatches", "disabled"), [(1, True), (2, False)]
)
def test_uncompiled_a_loss_may_ask_for_values(num_microbatches, disabled):
  def asks(params, batch):
    assert params["b"].sum() > 0
    rows = batch.pop("rows")
    # The error of Python for a value that is not there, not one of JAX.
    assert f"{rows[0, 0]:.2f}"
    return loss_of(params, np.asarray(rows))

  batch = {"rows": ROWS}
  with jax.disable_jit(disabled):
    found = call(asks, batch, num_microbatches=num_microbatches)
  assert set(batch) == {"rows"}
  assert_by_hand(found, loss_of)


@pytest.mark.parametrize("jit", [False, True])
def test_parameters_of_a_weak_type_are_traced_once(jit):
  calls = []

  def counted(params, rows):
    calls.append(params["b"].weak_type)
    return loss_of(params, rows)

  found = call(counted, params={**PARAMS, "b": jnp.full(3, 1.0)}, jit=jit)
  assert calls == [True]
  assert_by_hand(found, loss_of)


def test_no_trace_is_kept_longer_than_its_step():
  with jax.checking_leaks():
    call(loss_of, jit=True, num_microbatches=2, every=2, ascent_fraction=0.5)


def test_an_error_of_the_data_ends_the_first_call():
  calls = []

  def reads(params, rows):
    calls.append(1)
    raise OSError("a record cannot be read")

  with pytest.raises(OSError, match="a record"):
    call(reads)
  assert calls == [1]


def test_what_an_uncompiled_loss_returns_is_not_kept():
  references = []

  def with_aux(params, rows):
    references.append(weakref.ref(kept := {"no array"}))
    return loss_of(params, rows), {"kept": kept}

  for _ in range(3):
    assert call(with_aux, has_aux=True)[0][1]["kept"] == {"no array"}
  gc.collect()
  assert [x() for x in references] == [None] * 3


@pytest.fixture
def compilations():
  """Counts what XLA compiles."""
  found = []

  def listen(event, duration, **kwargs):
    del duration, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
      found.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield found
  jax.monitoring.clear_event_listeners()


@pytest.mark.parametrize(
  "options",
  [
    {"every": 2, "num_microbatches": 2, "ascent_fraction": 0.5},
    {"num_microbatches": 2, "sync_perturbation": False},
  ],
  ids=["gate, parts and fraction", "part by part"],
)
def test_uncompiled_nothing_is_compiled_after_the_first_steps(
  compilations, options
):
  momentum, key = optax.sgd(0.1, momentum=0.9), jax.random.key(0)
  state = state_of(PARAMS, PERTURBATION, momentum, rng=key)
  step = fsam_optax.make_train_step(
    lambda params, model_state, rows, rng: (
      loss_of(params, rows),
      (model_state, {"draw": jax.random.uniform(rng)}),
    ),
    jit=False,
    **options,
  )
  for _ in range(2):
    state, _ = step(state, ROWS)
  jax.jit(lambda x: x + 1)(ROWS)
  assert compilations
  compilations.clear()
  for _ in range(2):
    state, _ = step(state, ROWS)
  assert not compilations

"""The Flax step: what moves, what does not, and what the caller keeps."""

from copy import deepcopy

from by_hand import assert_close
from by_hand import assert_same_bits
import chex
from faces import state_of
from flax import errors
from flax import linen as nn
from flax import struct
from flax.training import train_state
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax


class Network(nn.Module):
  """BatchNorm and dropout, the two layers that tell the passes apart."""

  @nn.compact
  def __call__(self, inputs):
    x = nn.Dense(8)(inputs)
    x = nn.BatchNorm(use_running_average=False, momentum=0.9)(x)
    x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
    return nn.Dense(2)(x)


NETWORK = Network()


def network_loss(params, model_state, batch, rng):
  outputs, model_state = NETWORK.apply(
    {"params": params, **model_state},
    batch["x"],
    mutable=["batch_stats"],
    rngs={"dropout": rng},
  )
  loss = jnp.mean((outputs - batch["y"]) ** 2)
  return loss, (model_state, {"mean_output": jnp.mean(outputs)})


@pytest.fixture(scope="module")
def variables():
  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  return jax.jit(NETWORK.init)(rngs, jnp.zeros((16, 3)))


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  return {
    "x": rng.normal(size=(6, 16, 3)).astype(np.float32),
    "y": rng.normal(size=(6, 16, 2)).astype(np.float32),
  }


def copy(tree):
  """The values, out of reach of donation."""
  return jax.tree.map(jnp.copy, tree)


def at(batches, t):
  return jax.tree.map(lambda x: x[t], batches)


PERTURBATION = fsam_optax.friendly_perturbation(rho=0.5)
OPTIMIZER = optax.adam(1e-2)


@pytest.fixture
def new_state(variables):
  """Makes a state of fresh arrays, because a step deletes those it gets."""

  def make(perturbation=PERTURBATION, rng=None):
    statistics = copy(variables["batch_stats"])
    return state_of(
      variables["params"],
      perturbation,
      OPTIMIZER,
      model_state={"batch_stats": statistics},
      rng=jax.random.key(7) if rng is None else rng,
    )

  return make


@pytest.fixture(scope="module")
def step():
  return fsam_optax.make_train_step(network_loss)


@pytest.mark.parametrize(
  ("collections", "kind"),  # Of the statistics, and of what breaks.
  [
    (lambda state: {**state}, TypeError),
    (lambda state: {"batch_stats": state}, errors.FlaxError),
    (lambda state: {}, ValueError),
  ],
  ids=["all collections", "the collection alone", "nothing"],
)
def test_a_forgotten_model_state_is_named_with_the_remedy(
  new_state, batches, collections, kind
):
  def loss_fn(params, model_state, batch, rng):
    return network_loss(params, collections(model_state), batch, rng)

  step = fsam_optax.make_train_step(loss_fn)
  with pytest.raises(kind) as caught:
    step(new_state().replace(model_state=None), at(batches, 0))
  text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
  assert "`model_state` of the train state is None" in text
  assert "TrainState.create(..., model_state=" in text


def test_other_errors_of_a_loss_say_nothing_of_the_model_state(
  new_state, batches
):
  step = fsam_optax.make_train_step(lambda *_: jnp.zeros(2) + jnp.zeros(3))
  with pytest.raises(TypeError) as caught:
    step(new_state().replace(model_state=None), at(batches, 0))
  assert "model_state" not in "".join(getattr(caught.value, "__notes__", []))


def test_statistics_move_once_a_step_and_from_the_clean_pass(
  new_state, step, batches
):
  clean_pass = jax.jit(network_loss)
  state = new_state()
  own_key = copy(state.rng)
  for t in range(3):
    assert state.step == t
    params, model_state = copy(state.params), copy(state.model_state)
    # The key of the state stays; that of the step is folded from it.
    assert_same_bits(state.rng, own_key)
    key = jax.random.fold_in(jax.random.key(7), t)
    loss, (expected, own) = clean_pass(params, model_state, at(batches, t), key)
    state, metrics = step(state, at(batches, t))
    assert_close(state.model_state, expected)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
      metrics["mean_output"], own["mean_output"], rtol=1e-4, atol=1e-6
    )
    # The radius is large enough for the other pass to differ.
    assert abs(float(metrics["sharpness"])) > 1e-2
  assert state.step.dtype == jnp.int32
  assert state.perturbation_state[0].count == 3


def test_both_passes_see_the_same_dropout_mask(new_state, step, batches):
  still = new_state(fsam_optax.friendly_perturbation(rho=0.0))
  _, metrics = step(still, at(batches, 0))
  assert metrics["perturbed_loss"] == metrics["loss"]


def line_loss(params, model_state, batch, rng):
  """Of a linear model without a model state and a key, which are None then."""
  assert model_state is None
  assert rng is None
  residual = batch["x"] @ params["w"] + params["b"] - batch["y"]
  return jnp.mean(residual**2), (model_state, {"own": residual})


def line_state(perturbation=PERTURBATION, tx=OPTIMIZER, **kwargs):
  params = {
    "w": jnp.array([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]),
    "b": jnp.zeros(2),
  }
  return state_of(params, perturbation, tx, **kwargs)


NAMES = {"gradient_norm", "direction_norm", "gradient_ema_cosine"}


def test_metrics_are_those_asked_for_and_those_of_the_two_passes(batches):
  pure = fsam_optax.make_train_step(line_loss, metrics=NAMES, jit=False)
  step = jax.jit(pure)
  loss_fn = lambda params, batch: line_loss(params, None, batch, None)[0]
  fn = jax.jit(fsam_optax.value_and_grad(loss_fn, PERTURBATION))
  state = line_state()
  for t in range(2):
    batch = at(batches, t)
    loss, _, _, info = fn(state.params, state.perturbation_state, batch)
    state, metrics = step(state, batch)
    expected = {
      "loss": loss,
      "perturbed_loss": info.perturbed_value,
      "sharpness": info.perturbed_value - loss,
      "perturbation_norm": info.perturbation_norm,
      "skipped": jnp.int32(0),
      **{name: getattr(info, name) for name in NAMES},
    }
    assert metrics.pop("own").shape == (16, 2)
    chex.assert_trees_all_close(metrics, expected, rtol=1e-5, atol=1e-6)
  assert metrics["skipped"].dtype == jnp.int32
  np.testing.assert_allclose(metrics["perturbation_norm"], 0.5, rtol=1e-5)
  assert state.model_state is state.rng is None
  few = fsam_optax.make_train_step(line_loss, jit=False)
  _, metrics = jax.eval_shape(few, state, batch)
  assert metrics.keys() == {"own", *expected} - NAMES


# Which of (loss, gradient) x (first pass, second pass) goes wrong.
SITES = {
  "loss": 0,
  "gradient": 1,
  "perturbed loss alone": 2,
  "perturbed gradient alone": 3,
}


def fragile_loss(params, model_state, batch, rng):
  """Goes wrong at the site that the batch names, if any."""
  is_clean = jnp.all(params["w"] == batch["clean"])
  is_at = lambda clean, other: (
    batch["site"] == jnp.where(is_clean, SITES[clean], SITES[other])
  )
  value = jnp.where(is_clean, jnp.nan, jnp.inf)
  added = jnp.where(is_at("loss", "perturbed loss alone"), value, 0.0)
  # The slope of a root at zero is infinite, and of a product with zero NaN.
  is_steep = is_at("gradient", "perturbed gradient alone")
  added += jnp.sqrt(jnp.where(is_steep, 0.0 * params["w"][0, 0], 1.0)) - 1.0
  noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
  residual = batch["x"] @ params["w"] + params["b"] - batch["y"] + noise
  model_state = {"count": model_state["count"] + 1}
  return jnp.mean(residual**2) + added, (model_state, {})


# One object, so that the states of all tests share one compiled step.
FRAGILE_OPTIMIZER = optax.adam(optax.linear_schedule(0.1, 0.0, 9))


def fragile_state(perturbation=PERTURBATION):
  return line_state(
    perturbation,
    FRAGILE_OPTIMIZER,
    model_state={"count": jnp.zeros([], jnp.int32)},
    rng=jax.random.key(5),
  )


def fragile_batch(state, batches, t, site=-1):
  return {
    **at(batches, t),
    "clean": np.array(state.params["w"]),
    "site": np.int32(site),
  }


@pytest.fixture(scope="module")
def fragile_step(platform):
  """The step as a platform skips: by a branch, or by a select."""
  del platform
  return fsam_optax.make_train_step(fragile_loss)


@pytest.mark.device
@pytest.mark.parametrize("site", SITES)
def test_a_step_that_is_not_finite_changes_no_bit_of_the_state(
  fragile_step, batches, site
):
  state = fragile_state()
  state, metrics = fragile_step(state, fragile_batch(state, batches, 0))
  assert metrics["skipped"] == 0
  before = copy(state)
  taken, _ = fragile_step(copy(state), fragile_batch(state, batches, 1))
  broken = fragile_batch(state, batches, 1, SITES[site])
  state, metrics = fragile_step(state, broken)
  assert metrics["skipped"] == 1
  # All but the average, which keeps a first gradient that was finite.
  average, radius = state.perturbation_state
  kept = (before.perturbation_state[0], radius)
  assert_same_bits(state.replace(perturbation_state=kept), before)
  expected = before if site == "gradient" else taken
  assert_close(average, expected.perturbation_state[0], 1e-6)
  # The metrics still say where it went wrong.
  wrong = {"loss": "loss", "perturbed loss alone": "perturbed_loss"}.get(site)
  for name in ("loss", "perturbed_loss"):
    assert np.isfinite(metrics[name]) == (name != wrong), name
  # The run goes on, from parameters that never saw the batch.
  state, metrics = fragile_step(state, fragile_batch(state, batches, 2))
  assert metrics["skipped"] == 0
  assert state.step == 2


def test_a_plain_step_that_is_not_finite_is_skipped_too(fragile_step, batches):
  state = fragile_state(perturbation=None)
  before = copy(state)
  for site in ("loss", "gradient"):
    batch = fragile_batch(state, batches, 0, SITES[site])
    state, metrics = fragile_step(state, batch)
    assert metrics["skipped"] == 1
    assert_same_bits(state, before)


@pytest.fixture(scope="module")
def careless_step():
  return fsam_optax.make_train_step(fragile_loss, skip_nonfinite=False)


@pytest.mark.parametrize("site", SITES)
def test_without_skipping_the_step_is_taken(careless_step, batches, site):
  state = fragile_state()
  before = copy(state)
  state, metrics = careless_step(
    state, fragile_batch(state, batches, 0, SITES[site])
  )
  assert metrics["skipped"] == 0
  assert state.step == 1
  assert state.model_state["count"] == 1
  is_nan = bool(np.isnan(np.array(state.params["w"])).any())
  # After a first gradient that is not finite there is no perturbation, and the
  # second pass meets the same gradient.
  assert is_nan == (site in ("gradient", "perturbed gradient alone"))
  # What is not finite never enters the average, whoever else takes it.
  assert np.isfinite(np.array(state.perturbation_state[0].ema["w"])).all()
  assert not np.array_equal(copy(state.params["b"]), before.params["b"])


def test_the_state_is_donated_and_nothing_else(new_state, step, batches):
  """A buffer that cannot be donated warns, and a warning fails the test."""
  key = jax.random.key(3)
  state = new_state(rng=key)
  batch = jax.tree.map(jnp.asarray, at(batches, 0))
  types = jax.tree.map(jax.typeof, state)
  state, _ = step(state, batch)
  assert jax.tree.map(jax.typeof, state) == types
  for t in range(2):
    before = state
    state, _ = step(state, batch)
    # The key is given back as it came, so that its buffer may live on in the
    # new state; every other buffer is gone.
    for x in jax.tree.leaves(before.replace(rng=None)):
      assert x.is_deleted(), t
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))
  assert not any(x.is_deleted() for x in jax.tree.leaves((batch, key)))


def test_a_compiled_step_can_be_copied(new_state, step, batches):
  state, _ = deepcopy(step)(new_state(), at(batches, 0))
  assert state.step == 1


def test_the_pure_step_maps_over_seeds_and_deletes_nothing(batches):
  """Skipping is decided seed by seed."""
  pure = fsam_optax.make_train_step(fragile_loss, jit=False)
  state = fragile_state()
  states = jax.tree.map(lambda x: jnp.stack([x] * 3), state)
  seeds = jax.random.split(jax.random.key(0), 3)
  states = states.replace(rng=seeds)
  one = fragile_batch(state, batches, 0)
  stacked = jax.tree.map(lambda x: np.stack([x] * 3), one)
  stacked["site"] = np.array([-1, SITES["perturbed gradient alone"], -1])
  after, metrics = jax.jit(jax.vmap(pure))(states, stacked)
  np.testing.assert_array_equal(metrics["skipped"], [0, 1, 0])
  np.testing.assert_array_equal(after.step, [1, 0, 1])
  assert_same_bits(after.params["w"][1], states.params["w"][1])
  alone = jax.jit(pure)
  for seed in (0, 2):
    expected, _ = alone(state.replace(rng=seeds[seed]), one)
    found = jax.tree.map(lambda x, i=seed: x[i], after.params)
    assert_close(found, expected.params)


@pytest.fixture(scope="module")
def plain_flax(variables, batches):
  """The loop that Flax's own guide writes, with the same keys."""

  class State(train_state.TrainState):
    batch_stats: dict = struct.field(default_factory=dict)

  @jax.jit
  def train_step(state, batch):
    rng = jax.random.fold_in(jax.random.key(7), state.step)
    (loss, (model_state, _)), grads = jax.value_and_grad(
      network_loss, has_aux=True
    )(state.params, {"batch_stats": state.batch_stats}, batch, rng)
    return state.apply_gradients(
      grads=grads, batch_stats=model_state["batch_stats"]
    ), loss

  state = State.create(
    apply_fn=NETWORK.apply,
    params=variables["params"],
    tx=OPTIMIZER,
    batch_stats=variables["batch_stats"],
  )
  losses = []
  for t in range(4):
    state, loss = train_step(state, at(batches, t))
    losses.append(loss)
  return (state.params, state.opt_state, state.batch_stats), losses


def test_without_a_perturbation_it_is_plain_flax_bit_for_bit(
  new_state, batches, plain_flax
):
  # Skipping takes the update in a branch, where XLA rounds it differently.
  step = fsam_optax.make_train_step(network_loss, skip_nonfinite=False)
  state, losses = new_state(perturbation=None), []
  for t in range(4):
    state, metrics = step(state, at(batches, t))
    losses.append(metrics["loss"])
    assert metrics["perturbation_norm"] == metrics["sharpness"] == 0
  found = state.params, state.opt_state, state.model_state["batch_stats"]
  assert_same_bits((found, losses), plain_flax)

"""Orbax saves the whole state; a resumed run is the unbroken run."""

from by_hand import assert_same_bits
from by_hand import bits
from faces import state_of
from flax.training import train_state
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import fsam_optax
from fsam_optax import checkpoint
from fsam_optax import sharding

# One of each, for a jitted step to be compiled once for all states.
ADAMW = optax.adamw(1e-2)
PERTURBATION = fsam_optax.friendly_perturbation(rho=0.05)


def loss_fn(params, model_state, batch, rng):
  inputs, targets = batch
  hidden = inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"]
  mean = hidden.mean(0)
  hidden = jnp.tanh(hidden - mean)
  hidden = hidden * jax.random.bernoulli(rng, 0.8, hidden.shape)
  loss = jnp.mean((hidden @ params["output"] - targets) ** 2)
  old = model_state["batch_stats"]["mean"]
  return loss, ({"batch_stats": {"mean": 0.9 * old + 0.1 * mean}}, {})


def make_state(*, key=None, width=8, tx=ADAMW):
  """Adamw, statistics of BatchNorm's kind, a dropout key, F-SAM."""
  kernel = np.random.default_rng(1).normal(size=(width, width))
  hidden = {
    "kernel": jnp.array(kernel / width**0.5, jnp.float32),
    "bias": jnp.zeros(width),
  }
  return state_of(
    {"hidden": hidden, "output": jnp.ones(width)},
    PERTURBATION,
    tx,
    model_state={"batch_stats": {"mean": jnp.zeros(width)}},
    rng=jax.random.key(2) if key is None else key,
  )


def batch_of(step):
  """The batch of a step: a resumed run must see the data it would have seen."""
  rng = np.random.default_rng((2, step))
  draw = lambda *shape: np.asarray(rng.normal(size=shape), np.float32)
  return draw(16, 8), draw(16)


def make_manager(directory):
  return ocp.CheckpointManager(
    directory, item_handlers=ocp.StandardCheckpointHandler()
  )


@pytest.fixture(scope="module")
def train_step():
  return fsam_optax.make_train_step(loss_fn)


def train(train_step, state, number):
  for step in range(int(state.step), int(state.step) + number):
    state, _ = train_step(state, batch_of(step))
  return state


def save(directory, state):
  with make_manager(directory) as manager:
    manager.save(int(state.step), args=ocp.args.StandardSave(state))


def restore(directory, state):
  with make_manager(directory) as manager:
    step = manager.latest_step()
    checkpoint.check(manager.item_metadata(step), state)
    return manager.restore(step, args=ocp.args.StandardRestore(state))


def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path, train_step):
  state = train(train_step, make_state(), 3)
  expected = bits(state)
  save(tmp_path, state)
  # Of another seed, so that nothing of the target can pass for the restored.
  fresh = make_state(key=jax.random.key(9))
  restored = restore(tmp_path, fresh)
  assert jax.tree.structure(restored) == jax.tree.structure(fresh)
  assert bits(restored) == expected
  assert_same_bits(train(train_step, restored, 3), train(train_step, state, 3))
  # It is donated like one that was never saved.
  assert all(x.is_deleted() for x in jax.tree.leaves(restored.params))


def test_a_run_goes_on_with_other_devices(tmp_path):
  """Where the state that it is restored into is placed."""
  mesh = make_mesh(shard=8)
  rule = sharding.fsdp_rule(mesh, "shard", min_size=8)
  state, target = make_state(), sharding.place_state(make_state(), mesh, rule)
  for directory, saved, into in (
    (tmp_path / "one", state, target),
    (tmp_path / "eight", target, state),
  ):
    save(directory, saved)
    restored = restore(directory, into)
    assert_same_bits(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(
      lambda x: x.sharding, into
    )


DIFFERENCES = {
  "smaller model": (
    lambda: make_state(width=4),
    r"of another shape or dtype: .*params\.hidden\.kernel \(saved "
    r"float32\[8, 8\], state float32\[4, 4\]\)",
  ),
  "another optimizer": (
    lambda: make_state(tx=optax.sgd(0.1, momentum=0.9)),
    r"missing in the checkpoint: opt_state\.0\.trace.*; missing in the state: "
    r"opt_state\.0\.count, .*opt_state\.0\.nu\.hidden\.kernel",
  ),
  "another generator": (
    lambda: make_state(key=jax.random.key(0, impl="rbg")),
    r"rng \(saved uint32\[2\], state uint32\[4\]\)",
  ),
}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "state"
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, make_state())
    checkpointer.wait_until_finished()
    return checkpointer.metadata(path)


@pytest.mark.parametrize(
  ("make", "message"), DIFFERENCES.values(), ids=DIFFERENCES
)
def test_a_checkpoint_of_another_structure_is_an_error_that_names_it(
  metadata, make, message
):
  with pytest.raises(ValueError, match=message):
    checkpoint.check(metadata, make())


def test_what_fits_is_not_an_error(metadata):
  state = make_state()
  checkpoint.check(metadata, state)
  checkpoint.check(metadata.item_metadata, state)
  checkpoint.check(metadata, jax.eval_shape(lambda: state))
  checkpoint.check(metadata, state.replace(step=0))
  # rho is code, not data: it may change from one run to the next.
  checkpoint.check(
    metadata,
    state.replace(perturbation=fsam_optax.friendly_perturbation(rho=0.2)),
  )


def test_the_width_of_a_count_is_no_difference():
  """Flax's own train state saves the Python int that it begins with."""
  for saved in (np.int64(3), 3, np.int16(3)):
    checkpoint.check({"step": saved}, {"step": jnp.int32(0)})


@pytest.mark.parametrize(
  ("saved", "wanted"),
  [
    (np.float64(0), np.float32(0)),
    (np.int32(0), np.uint32(0)),
    (np.zeros(2, np.int64), np.zeros(2, np.int32)),
    (np.int64(0), np.zeros(1, np.int64)),
    (np.bool_(0), np.int32(0)),
  ],
  ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_any_other_dtype_or_shape_is_a_difference(saved, wanted):
  with pytest.raises(ValueError, match="of another shape or dtype: count"):
    checkpoint.check({"count": saved}, {"count": wanted})


def test_a_long_list_of_differences_is_cut(metadata):
  state = make_state()
  more = {f"layer{i:02}": jnp.ones(2) for i in range(30)}
  state = state.replace(params={**state.params, **more})
  message = r"in the checkpoint: .*params\.layer09 and 20 more\. Build"
  with pytest.raises(ValueError, match=message):
    checkpoint.check(metadata, state)


def flax_state():
  state = make_state()
  return train_state.TrainState.create(
    apply_fn=None, params=state.params, tx=state.tx
  )


def test_a_checkpoint_of_flax_goes_on_with_its_step_and_optimizer_state(
  tmp_path, train_step
):
  old = flax_state()
  old = old.apply_gradients(grads=old.params)
  save(tmp_path, old)
  with pytest.raises(ValueError, match="restore it into the state that it"):
    restore(tmp_path, make_state())
  plain = restore(tmp_path, flax_state())
  state = make_state().replace(
    step=jnp.int32(plain.step), params=plain.params, opt_state=plain.opt_state
  )
  assert int(state.step) == old.step == 1
  assert_same_bits((state.params, state.opt_state), (old.params, old.opt_state))
  state, metrics = train_step(state, batch_of(1))
  assert int(state.step) == int(state.opt_state[0].count) == 2
  np.testing.assert_allclose(metrics["perturbation_norm"], 0.05, rtol=1e-5)

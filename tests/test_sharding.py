"""Many devices: N equal one, and each mode is what its equations say."""

from by_hand import assert_near
from by_hand import flat
from by_hand import unflat
from faces import FACES
from faces import state_of
from faces import step_of as step_of_loss
from flax import jax_utils
import hlo
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from meshes import make_mesh
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import sharding

DEVICES, ROWS, STEPS = 8, 32, 3
RHO, LMBDA, LEARNING_RATE = 0.3, 0.5, 0.1
LEAN = {"sync_perturbation": False, "ema_gradient": "descent"}

pytestmark = pytest.mark.usefixtures("x64")


def loss_fn(params, model_state, batch, rng):
  """A regression with BatchNorm's kind of statistics and a counter."""
  x, y = batch
  hidden = jnp.tanh(x @ params["in"] + params["bias"])
  loss = jnp.mean((hidden @ params["out"] - y) ** 2)
  state = {
    "mean": 0.9 * model_state["mean"] + 0.1 * hidden.mean(0),
    "count": model_state["count"] + 1,
  }
  metrics = {"first": y[0]}
  if rng is not None:
    metrics["noise"] = jax.random.normal(rng, dtype=y.dtype)
  return loss, (state, metrics)


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  return [
    (rng.normal(size=(ROWS, 5)), rng.normal(size=ROWS)) for _ in range(STEPS)
  ]


def make_state(rng=None):
  draw = np.random.default_rng(1)
  params = {
    "in": jnp.asarray(draw.normal(size=(5, 8))),
    "bias": jnp.zeros(8),
    "out": jnp.asarray(draw.normal(size=8)),
  }
  return state_of(
    params,
    fsam_optax.friendly_perturbation(RHO, lmbda=LMBDA),
    optax.sgd(LEARNING_RATE, momentum=0.9),
    model_state={"mean": jnp.zeros(8), "count": jnp.int32(0)},
    rng=rng,
  )


def step_of(**options):
  return fsam_optax.make_train_step(loss_fn, jit=False, **options)


def split(batch):
  """The rows with an axis over the devices in front, as pmap takes them."""
  return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def run(kind, batches, axes=("batch",), sizes=(DEVICES,), **options):
  """The state and the metrics after a step a batch, by one kind of wrapper."""
  state = make_state()
  options["metrics"] = ("gradient_norm",)
  step = step_of(axis_name=axes, **options)
  if kind == "one device":
    step = fsam_optax.make_train_step(loss_fn, **options)
  elif kind == "pmap":
    step = jax.pmap(step, axis_name="batch", donate_argnums=0)
    state, batches = jax_utils.replicate(state), map(split, batches)
  elif kind == "vmap":
    step = jax.jit(sharding.group_step(step, DEVICES), donate_argnums=0)
  else:
    mesh = make_mesh(**dict(zip(axes, sizes, strict=True)))
    is_checked = kind == "checked"
    step = sharding.shard_map_step(step, mesh, axes, check_vma=is_checked)
    state = sharding.place_state(state, mesh)
    batches = map(sharding.BatchFeeder(mesh, axes), batches)
  for batch in batches:
    state, metrics = step(state, batch)
  if kind == "pmap":  # Of the first replica.
    return jax_utils.unreplicate((state, metrics))
  return state, metrics


def numbers(state):
  """The arrays of a state but its key, as one tree."""
  state = state.replace(rng=None, tx=None, perturbation=None)
  return jax.tree.map(np.asarray, state)


def close(state, other):
  assert_near(numbers(state), numbers(other), 1e-10)


KINDS = ("pmap", "checked", "unchecked", "vmap")
# The options, and in which wrappers.
MODES = {
  "default": ({}, KINDS),
  "fraction, average of the descent": (
    {"ascent_fraction": 0.5, "ema_gradient": "descent"},
    ("checked",),
  ),
  "gate, fraction, micro-batches": (
    {"every": 2, "ascent_fraction": 0.5, "num_microbatches": 2},
    ("checked", "vmap"),
  ),
}
LOCAL_MODES = {
  "lean_gate_fraction": {**LEAN, "every": 2, "ascent_fraction": 0.5},
  "lean_micro_batches": {**LEAN, "num_microbatches": 2},
}
METRICS = ("loss", "perturbed_loss", "gradient_norm", "perturbation_norm")


@pytest.mark.parametrize("mode", MODES)
def test_many_devices_equal_one_device(mode, batches):
  options, kinds = MODES[mode]
  expected, expected_metrics = run("one device", batches, **options)
  for kind in kinds:
    state, metrics = run(kind, batches, **options)
    close(state, expected)
    for name in METRICS:
      np.testing.assert_allclose(
        metrics[name], expected_metrics[name], rtol=1e-10
      )


@pytest.mark.slow
@pytest.mark.parametrize("options", LOCAL_MODES.values(), ids=LOCAL_MODES)
def test_pmap_shard_map_and_vmap_agree(options, batches):
  states = {kind: run(kind, batches, **options)[0] for kind in KINDS}
  for state in states.values():
    close(state, states["pmap"])


@jax.jit
@jax.grad
def gradient_of(params, batch):
  model_state = {"mean": jnp.zeros(8), "count": 0}
  return loss_fn(params, model_state, batch, None)[0]


def in_numpy(batches, groups, ema_gradient):
  """F-SAM whose groups of rows each ascend alone, from the equations."""
  params = make_state().params
  gradient = lambda w, batch: flat(gradient_of(unflat(w, params), batch))
  w = flat(params)
  average, velocity = None, np.zeros_like(w)
  for x, y in batches:
    parts = list(zip(np.split(x, groups), np.split(y, groups), strict=True))
    own = [gradient(w, part) for part in parts]
    directions = [g if average is None else g - average for g in own]
    descents = [
      gradient(w + RHO * d / np.linalg.norm(d), part)
      for d, part in zip(directions, parts, strict=True)
    ]
    descent = np.mean(descents, axis=0)
    taken = descent if ema_gradient == "descent" else np.mean(own, axis=0)
    average = (
      taken if average is None else LMBDA * average + (1 - LMBDA) * taken
    )
    velocity = 0.9 * velocity + descent
    w = w - LEARNING_RATE * velocity
  return w, average


def vectors(state):
  return flat(state.params), flat(state.perturbation_state[0].ema)


@pytest.mark.parametrize(
  ("kind", "ema_gradient"),
  [
    ("checked", "ascent"),
    ("unchecked", "descent"),
    ("vmap", "ascent"),
    ("one device", "ascent"),
  ],
)
def test_each_replica_ascends_along_its_own_gradient_minus_the_global_average(
  kind, ema_gradient, batches
):
  """Or each micro-batch of one device, of which the i-th has every i-th row."""
  options = {"sync_perturbation": False, "ema_gradient": ema_gradient}
  expected = in_numpy(batches, DEVICES, ema_gradient)
  if kind == "one device":
    options["num_microbatches"] = DEVICES
    in_turn = lambda x: x.swapaxes(0, 1).reshape(ROWS, *x.shape[2:])
    batches = [jax.tree.map(in_turn, split(batch)) for batch in batches]
  state, _ = run(kind, batches, **options)
  assert_near(vectors(state), expected, 1e-10)


@pytest.mark.parametrize(
  ("kind", "ema_gradient"), [("unchecked", "ascent"), ("checked", "descent")]
)
def test_groups_of_replicas_ascend_along_their_own_mean(
  kind, ema_gradient, batches
):
  options = {"sync_perturbation": "replica", "ema_gradient": ema_gradient}
  state, _ = run(kind, batches, ("group", "replica"), (4, 2), **options)
  assert_near(vectors(state), in_numpy(batches, 4, ema_gradient), 1e-10)


def test_replicas_stay_bitwise_equal_and_average_what_they_report(batches):
  step = jax.pmap(
    step_of(axis_name="batch", sync_perturbation=False),
    axis_name="batch",
    donate_argnums=0,
  )
  state = jax_utils.replicate(make_state(jax.random.key(5)))
  for _ in range(5):
    for batch in batches:
      state, metrics = step(state, split(batch))
  for leaf in jax.tree.leaves(numbers(state)):
    assert leaf.shape[0] == DEVICES
    assert (leaf == leaf[:1]).all()
  assert int(state.model_state["count"][0]) == 5 * STEPS
  # The metrics of the loss, and the noise of a key of each replica's own.
  own = batches[-1][1].reshape(DEVICES, -1)[:, 0]
  np.testing.assert_allclose(metrics["first"], own.mean(), rtol=1e-12)
  key = jax.random.fold_in(jax.random.key(5), 5 * STEPS - 1)
  noise = [
    jax.random.normal(jax.random.fold_in(key, i), dtype=jnp.float64)
    for i in range(DEVICES)
  ]
  assert len(set(map(float, noise))) == DEVICES
  np.testing.assert_allclose(metrics["noise"], np.mean(noise), rtol=1e-12)


def test_under_jit_the_state_keeps_its_sharding_and_the_numbers(batches):
  mesh, paths = make_mesh(), []
  fsdp = sharding.fsdp_rule(mesh, min_size=8)
  rule = lambda path, leaf: (paths.append(path), fsdp(path, leaf))[1]
  state = sharding.place_state(make_state(), mesh, rule)
  assert {"params/in", "opt_state/0/trace/in"} < set(paths)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  momentum, average = state.opt_state[0].trace, state.perturbation_state[0].ema
  for leaf in jax.tree.leaves((state.params, momentum, average)):
    assert leaf.addressable_data(0).size == leaf.size // DEVICES
  feed = sharding.BatchFeeder(mesh)
  step = jax.jit(step_of(), donate_argnums=0, out_shardings=(shardings, None))
  for batch in batches:
    state, metrics = step(state, feed(batch))
  same = jax.tree.map(
    lambda x, before: x.sharding.is_equivalent_to(before, x.ndim),
    state,
    shardings,
  )
  assert jax.tree.all(same)
  expected, expected_metrics = run("one device", batches)
  close(state, expected)
  assert jax.device_get(metrics)["loss"] == pytest.approx(
    float(expected_metrics["loss"]), rel=1e-10
  )


def test_fsdp_splits_over_two_axes_what_neither_divides_alone():
  mesh = make_mesh(rows=4, more=2)
  rule = sharding.fsdp_rule(mesh, ("rows", "more"), min_size=8)
  spec = lambda *shape: rule("", jax.ShapeDtypeStruct(shape, "float32"))
  assert spec(3, 4, 6) == PartitionSpec(None, "rows", "more")
  assert spec(3, 16) == PartitionSpec(None, ("rows", "more"))
  assert spec(3, 6) == PartitionSpec(None, "more")
  assert spec(3, 5) == PartitionSpec(None, None)
  assert spec(4) == PartitionSpec()  # Smaller than the rule splits.


def words_all_reduced(perturbation=None, **options):
  """Elements all-reduced per parameter, by the compiled step."""
  step = step_of_loss(
    lambda params, batch: jnp.mean((batch @ params["w"]) ** 2),
    axis_name="batch",
    jit=False,
    **options,
  )
  params = {"w": jnp.ones((100, 100), jnp.float32)}
  state = state_of(params, perturbation, optax.sgd(0.1, momentum=0.9))
  mapped = sharding.shard_map_step(step, make_mesh())
  lowered = mapped.lower(state, jnp.ones((ROWS, 100), jnp.float32))
  found = hlo.collectives(lowered.compile().as_text())
  assert {x.kind for x in found} == {"all-reduce"}
  return sum(x.words for x in found) / 1e4


def test_lean_f_sam_all_reduces_what_sgd_does():
  f_sam = fsam_optax.friendly_perturbation(RHO)
  assert words_all_reduced() == pytest.approx(1, abs=0.01)
  assert words_all_reduced(f_sam, **LEAN) == pytest.approx(1, abs=0.01)
  assert words_all_reduced(f_sam) == pytest.approx(2, abs=0.01)
  local = {"sync_perturbation": False}
  assert words_all_reduced(f_sam, **local) == pytest.approx(2, abs=0.01)
  # SAM has no average, and its replicas nothing to agree on.
  sam = fsam_optax.sam_perturbation(RHO)
  assert words_all_reduced(sam, **local) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
  "options",
  [
    {"ascent_fraction": 0.5},
    {"num_microbatches": 2},
    {"sync_perturbation": False, "axis_name": "batch"},
  ],
  ids=["fraction", "micro-batches", "groups"],
)
def test_under_jit_no_collective_moves_the_batch(options, batches):
  mesh = make_mesh()
  step = step_of(**options)
  if "axis_name" in options:
    step = sharding.group_step(step, DEVICES)
  state = sharding.place_state(make_state(), mesh)
  rows = NamedSharding(mesh, PartitionSpec("batch"))
  batch = jax.device_put(batches[0], rows)
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  found = hlo.collectives(compiled.as_text())
  assert {x.kind for x in found} == {"all-reduce"}


def test_a_nonfinite_gradient_of_one_replica_skips_the_step_on_all(batches):
  x, y = batches[0]
  y = y.copy()
  y[-1] = np.nan
  mesh = make_mesh()
  for options in ({}, LEAN):
    step = sharding.shard_map_step(step_of(axis_name="batch", **options), mesh)
    state = sharding.place_state(make_state(), mesh)
    new_state, metrics = step(state, (x, y))
    assert int(metrics["skipped"]) == 1
    close(new_state, make_state())


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_a_feeder_splits_the_rows_over_the_devices(asarray, batches):
  x, y = batches[0]
  feeder = sharding.BatchFeeder(make_mesh())
  with pytest.raises(ValueError, match="must split evenly"):
    feeder(x[:7])  # It sets no shape for what follows.
  fed = feeder((asarray(x), asarray(y)))
  for array, rows in zip(fed, (x, y), strict=True):
    np.testing.assert_array_equal(array, rows)
    for i, shard in enumerate(array.addressable_shards):
      np.testing.assert_array_equal(shard.data, np.split(rows, DEVICES)[i])


# A loss that reduces itself over the axis.


def sum_over_count(x, axes):
  return jax.lax.psum(jnp.sum(x), axes) / jax.lax.psum(x.size, axes)


def own_mean(x, axes):
  del axes
  return jnp.mean(x)


def mean_of_all(x, axes):
  for axis in axes if isinstance(axes, tuple) else (axes,):
    x = jax.lax.all_gather(x, axis)
  return jnp.mean(x)


PARTS = {"num_microbatches": 2}
SQUARES = np.arange(16.0).reshape(16, 1) / 4 + 0.5


@pytest.mark.parametrize(
  ("face", "axes", "reduced", "over", "options"),
  [
    ("value_and_grad", ("a", "b"), sum_over_count, ("a", "b"), PARTS),
    ("train_step", ("a", "b"), sum_over_count, "b", {}),
    ("nnx_optimizer", ("a", "b"), mean_of_all, ("a", "b"), {}),
    # Where some axes of the mesh alone are manual.
    ("value_and_grad", ("b",), own_mean, None, PARTS),
  ],
)
def test_a_loss_that_reduces_itself_or_not_is_that_of_all_rows(
  face, axes, reduced, over, options
):
  """Under the default check, where a gradient knows what it varies along."""

  def gradient(w, x):
    """What an update of rate 1 takes off the weight."""
    carry, step = FACES[face](
      lambda params, x: reduced((x * params["w"]) ** 2, over),
      {"w": w},
      optax.sgd(1.0),
      fsam_optax.friendly_perturbation(0.0),
      axis_name=axes,
      **options,
    )
    return w - step(carry, x)[0][0]["w"]

  mapped = jax.shard_map(
    gradient,
    mesh=make_mesh(a=2, b=4),
    in_specs=(PartitionSpec(), PartitionSpec(axes)),
    out_specs=PartitionSpec(),
    axis_names=set(axes),
  )
  found = jax.jit(mapped)(jnp.array([3.0]), jnp.asarray(SQUARES))
  np.testing.assert_allclose(found, [2 * 3 * np.mean(SQUARES**2)], rtol=1e-10)

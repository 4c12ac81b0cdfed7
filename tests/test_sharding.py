"""Many devices: N equal one, and each mode is what its equations say."""

import re

from flax import jax_utils
from flax import nnx
import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
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
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params={
      "in": jnp.asarray(draw.normal(size=(5, 8))),
      "bias": jnp.zeros(8),
      "out": jnp.asarray(draw.normal(size=8)),
    },
    tx=optax.sgd(LEARNING_RATE, momentum=0.9),
    perturbation=fsam_optax.friendly_perturbation(RHO, lmbda=LMBDA),
    model_state={"mean": jnp.zeros(8), "count": jnp.int32(0)},
    rng=rng,
  )


def make_mesh(**sizes):
  """A mesh along whose axes the compiler may choose, by default of one axis."""
  sizes = sizes or {"batch": DEVICES}
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )


def split(batch):
  """The rows with an axis over the devices in front, as pmap takes them."""
  return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)


def run(kind, batches, rng=None, **options):
  """The state and the metrics after a step a batch, by one kind of wrapper."""
  state = make_state(rng)
  options["metrics"] = ("gradient_norm",)
  if kind == "one device":
    step = fsam_optax.make_train_step(loss_fn, **options)
    for batch in batches:
      state, metrics = step(state, batch)
    return state, metrics
  step = fsam_optax.make_train_step(
    loss_fn, axis_name="batch", jit=False, **options
  )
  if kind == "pmap":
    return run_pmap(step, state, batches)
  if kind == "vmap":
    step = jax.jit(sharding.group_step(step, DEVICES), donate_argnums=0)
  else:
    mesh = make_mesh()
    step = sharding.shard_map_step(step, mesh, check_vma=kind == "checked")
    state = sharding.place_state(state, mesh)
  for batch in batches:
    state, metrics = step(state, batch)
  return state, metrics


def run_pmap(step, state, batches):
  """The state and the metrics of the first replica after a step a batch."""
  step = jax.pmap(step, axis_name="batch", donate_argnums=0)
  state = jax_utils.replicate(state)
  for batch in batches:
    state, metrics = step(state, split(batch))
  return jax_utils.unreplicate(state), jax_utils.unreplicate(metrics)


def numbers(state):
  """The arrays of a state but its key, as one tree."""
  state = state.replace(rng=None, tx=None, perturbation=None)
  return jax.tree.map(np.asarray, state)


def close(tree, other, rtol=1e-10):
  assert jax.tree.structure(tree) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


MODES = {
  "default": {},
  "average_of_descent": {"ema_gradient": "descent"},
  "micro_batches": {"num_microbatches": 2},
  "fraction": {"ascent_fraction": 0.5},
  "gate": {"every": 2, "ascent_fraction": 0.5},
}
METRICS = ("loss", "perturbed_loss", "gradient_norm", "perturbation_norm")
LOCAL_MODES = {
  "local": {"sync_perturbation": False},
  "lean": LEAN,
  "lean_gate_fraction": {**LEAN, "every": 2, "ascent_fraction": 0.5},
  "lean_micro_batches": {**LEAN, "num_microbatches": 2},
}
modes = lambda which: pytest.mark.parametrize(
  "options", which.values(), ids=which
)


@modes(MODES)
def test_many_devices_equal_one_device(options, batches):
  expected, expected_metrics = run("one device", batches, **options)
  for kind in ("pmap", "checked", "unchecked", "vmap"):
    state, metrics = run(kind, batches, **options)
    close(numbers(state), numbers(expected))
    for name in METRICS:
      np.testing.assert_allclose(
        metrics[name], expected_metrics[name], rtol=1e-10
      )


@pytest.mark.slow
@modes(LOCAL_MODES)
def test_pmap_shard_map_and_vmap_agree(options, batches):
  states = {
    kind: numbers(run(kind, batches, **options)[0])
    for kind in ("pmap", "checked", "unchecked", "vmap")
  }
  for state in states.values():
    close(state, states["pmap"])


def in_numpy(batches, groups, ema_gradient):
  """F-SAM whose groups of rows each ascend alone, from the equations."""
  draw = np.random.default_rng(1)
  w = np.concatenate([draw.normal(size=40), np.zeros(8), draw.normal(size=8)])

  def gradient(w, batch):
    x, y = batch
    kernel, bias, out = w[:40].reshape(5, 8), w[40:48], w[48:]
    hidden = np.tanh(x @ kernel + bias)
    error = 2 * (hidden @ out - y) / len(y)
    slope = error[:, None] * out * (1 - hidden**2)
    return np.concatenate(
      [(x.T @ slope).ravel(), slope.sum(0), hidden.T @ error]
    )

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


def flat(tree):
  return np.concatenate([np.ravel(tree[k]) for k in ("in", "bias", "out")])


@pytest.mark.parametrize("ema_gradient", ["ascent", "descent"])
def test_each_replica_ascends_along_its_own_gradient_minus_the_global_average(
  ema_gradient, batches
):
  state, _ = run(
    "checked", batches, sync_perturbation=False, ema_gradient=ema_gradient
  )
  weights, average = in_numpy(batches, DEVICES, ema_gradient)
  np.testing.assert_allclose(flat(state.params), weights, rtol=1e-10)
  np.testing.assert_allclose(
    flat(state.perturbation_state[0].ema), average, rtol=1e-10, atol=1e-12
  )


@pytest.mark.parametrize("ema_gradient", ["ascent", "descent"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_groups_of_replicas_ascend_along_their_own_mean(
  ema_gradient, check_vma, batches
):
  mesh = make_mesh(group=4, replica=2)
  axes = ("group", "replica")
  step = sharding.shard_map_step(
    fsam_optax.make_train_step(
      loss_fn,
      axis_name=axes,
      sync_perturbation="replica",
      ema_gradient=ema_gradient,
      jit=False,
    ),
    mesh,
    axes,
    check_vma=check_vma,
  )
  state = sharding.place_state(make_state(), mesh)
  feed = sharding.BatchFeeder(mesh, axes)
  for batch in batches:
    state, _ = step(state, feed(batch))
  weights, average = in_numpy(batches, 4, ema_gradient)
  np.testing.assert_allclose(flat(state.params), weights, rtol=1e-10)
  np.testing.assert_allclose(
    flat(state.perturbation_state[0].ema), average, rtol=1e-10, atol=1e-12
  )


def test_replicas_stay_bitwise_equal_and_average_what_they_report(batches):
  step = jax.pmap(
    fsam_optax.make_train_step(
      loss_fn, axis_name="batch", sync_perturbation=False, jit=False
    ),
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


def test_a_step_of_one_gradient_a_replica_is_one_line_of_pmap(batches):
  step = jax.pmap(
    fsam_optax.make_train_step(loss_fn, axis_name="batch", jit=False),
    axis_name="batch",
  )
  state = jax_utils.replicate(make_state())
  for batch in batches:
    state, metrics = step(state, split(batch))
  expected, _ = run("one device", batches)
  close(numbers(jax_utils.unreplicate(state)), numbers(expected))
  assert metrics["loss"].shape == (DEVICES,)


def split_rule(path, leaf):
  """Tensor parallelism of the hidden layer, by the parameters' names."""
  if path.endswith("/in"):
    return PartitionSpec(None, "model")
  if path.endswith(("/out", "/bias")):
    return PartitionSpec("model")
  return PartitionSpec()


@pytest.mark.parametrize("layout", ["replicated", "fsdp", "tensor"])
def test_under_jit_the_state_keeps_its_sharding_and_the_numbers(
  layout, batches
):
  if layout == "tensor":
    mesh, rule = make_mesh(batch=2, model=4), split_rule
  else:
    mesh = make_mesh()
    rule = sharding.fsdp_rule(mesh, min_size=8) if layout == "fsdp" else None
  state = sharding.place_state(make_state(), mesh, rule)
  shardings = jax.tree.map(lambda x: x.sharding, state)
  if layout == "fsdp":
    for tree in (
      state.params,
      state.opt_state[0].trace,
      state.perturbation_state[0].ema,
    ):
      for leaf in jax.tree.leaves(tree):
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
  close(numbers(state), numbers(expected))
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
  with pytest.raises(ValueError, match="must name axes of the mesh"):
    sharding.fsdp_rule(mesh, "model")


def collectives(compiled):
  """Every collective of a program, as pairs of kind and elements."""
  found = []
  for result, kind in re.findall(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|collective-permute)(?:-start)?\(",
    compiled.as_text(),
  ):
    sizes = [
      int(np.prod([int(n) for n in dims.split(",") if n]))
      for dims in re.findall(r"\w\d+\[([\d,]*)\]", result)
    ]
    found.append((kind, sum(sizes)))
  return found


def words_all_reduced(perturbation=None, **options):
  """Elements all-reduced per parameter, by the compiled step."""
  mesh = make_mesh()
  step = fsam_optax.make_train_step(
    lambda params, model_state, batch, rng: (
      jnp.mean((batch @ params["w"]) ** 2),
      (model_state, {}),
    ),
    axis_name="batch",
    jit=False,
    **options,
  )
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params={"w": jnp.ones((100, 100), jnp.float32)},
    tx=optax.sgd(0.1, momentum=0.9),
    perturbation=perturbation,
  )
  compiled = (
    jax.jit(
      jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("batch")),
        out_specs=PartitionSpec(),
      )
    )
    .lower(state, jnp.ones((ROWS, 100), jnp.float32))
    .compile()
  )
  found = collectives(compiled)
  assert {kind for kind, _ in found} == {"all-reduce"}
  return sum(size for _, size in found) / 1e4


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


@modes(
  {
    "default": {},
    "fraction": {"ascent_fraction": 0.5},
    "micro_batches": {"num_microbatches": 2},
    "groups": {"sync_perturbation": False, "axis_name": "batch"},
  }
)
def test_under_jit_no_collective_moves_the_batch(options, batches):
  mesh = make_mesh()
  step = fsam_optax.make_train_step(loss_fn, jit=False, **options)
  if "axis_name" in options:
    step = sharding.group_step(step, DEVICES)
  state = sharding.place_state(make_state(), mesh)
  rows = NamedSharding(mesh, PartitionSpec("batch"))
  batch = jax.device_put(batches[0], rows)
  compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
  assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}
  new_state, _ = compiled(state, batch)
  if "axis_name" in options:
    weights, _ = in_numpy(batches[:1], DEVICES, "ascent")
  else:
    weights, _ = in_numpy(batches[:1], 1, "ascent")
  if "ascent_fraction" not in options:
    np.testing.assert_allclose(flat(new_state.params), weights, rtol=1e-10)


def test_a_nonfinite_gradient_of_one_replica_skips_the_step_on_all(batches):
  x, y = batches[0]
  y = y.copy()
  y[-1] = np.nan
  mesh = make_mesh()
  for options in ({}, LEAN):
    step = sharding.shard_map_step(
      fsam_optax.make_train_step(
        loss_fn, axis_name="batch", jit=False, **options
      ),
      mesh,
    )
    state = sharding.place_state(make_state(), mesh)
    new_state, metrics = step(state, (x, y))
    assert int(metrics["skipped"]) == 1
    close(numbers(new_state), numbers(make_state()))


# Bad input.


def step_of(**options):
  return fsam_optax.make_train_step(loss_fn, jit=False, **options)


def test_an_unbound_axis_is_named_with_the_remedy(batches):
  with pytest.raises(ValueError, match=r"`axis_name`.* got 'batch'.*Wrap"):
    step_of(axis_name="batch")(make_state(), batches[0])


def test_a_state_that_was_not_placed_is_refused(batches):
  step = step_of(axis_name="batch")
  on_mesh = sharding.shard_map_step(step, make_mesh())
  with pytest.raises(ValueError, match=r"`state`.* 8 devices.*place_state"):
    on_mesh(make_state(), batches[0])


def test_rows_that_do_not_divide_are_refused_with_the_numbers(batches):
  mesh = make_mesh()
  ragged = jax.tree.map(lambda x: x[:27], batches[0])
  message = r"`batch` must split evenly over 8 .* got 27 rows .* 3 of them"
  step = step_of(axis_name="batch")
  for refuse in (
    lambda: sharding.shard_map_step(step, mesh)(
      sharding.place_state(make_state(), mesh), ragged
    ),
    lambda: sharding.group_step(step, 8)(make_state(), ragged),
    lambda: sharding.BatchFeeder(mesh)(ragged),
  ):
    with pytest.raises(ValueError, match=message):
      refuse()


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_a_feeder_splits_the_rows_over_the_devices(asarray, batches):
  x, y = batches[0]
  fed = sharding.BatchFeeder(make_mesh())((asarray(x), asarray(y)))
  for array, rows in zip(fed, (x, y), strict=True):
    np.testing.assert_array_equal(array, rows)
    for i, shard in enumerate(array.addressable_shards):
      np.testing.assert_array_equal(shard.data, np.split(rows, DEVICES)[i])


def test_a_feeder_refuses_a_batch_of_another_shape(batches):
  feed = sharding.BatchFeeder(make_mesh())
  feed(batches[0])
  with pytest.raises(ValueError, match=r"`batch`.*shapes of the first.*16"):
    feed(jax.tree.map(lambda x: x[:16], batches[0]))


@pytest.mark.parametrize(
  ("call", "error", "message"),
  [
    (
      lambda: sharding.BatchFeeder(make_mesh(), "rows"),
      ValueError,
      r"`axis_name` must name axes of the mesh.*rows",
    ),
    (lambda: sharding.group_step(loss_fn, 0), ValueError, "`num_groups`"),
    (lambda: sharding.group_step(loss_fn, 2.0), TypeError, "`num_groups`"),
    (lambda: step_of(axis_name=3), TypeError, "`axis_name` must be the name"),
    (lambda: step_of(axis_name=()), ValueError, "`axis_name` must name"),
    (
      lambda: step_of(axis_name="a", sync_perturbation="b"),
      ValueError,
      r"`sync_perturbation` must name axes out of `axis_name`.*'b'",
    ),
    (
      lambda: step_of(sync_perturbation="b"),
      TypeError,
      "`sync_perturbation` must be a bool",
    ),
    (lambda: step_of(ema_gradient="g"), ValueError, "`ema_gradient` must be"),
    (
      lambda: step_of(ascent_fraction="x"),
      TypeError,
      "`ascent_fraction` must be a real number",
    ),
    (
      lambda: step_of(ascent_fraction=0),
      ValueError,
      r"`ascent_fraction` must be in \(0, 1\], got 0",
    ),
  ],
  ids=lambda x: "" if callable(x) or isinstance(x, type) else x[:24],
)
def test_bad_arguments_are_named(call, error, message):
  with pytest.raises(error, match=message):
    call()


def test_integer_outputs_that_would_be_averaged_are_refused(batches):
  def counting(params, model_state, batch, rng):
    loss, (model_state, _) = loss_fn(params, model_state, batch, rng)
    return loss, (model_state, {"rows": batch[1].shape[0]})

  step = sharding.group_step(
    fsam_optax.make_train_step(counting, axis_name="batch", jit=False), 2
  )
  with pytest.raises(TypeError, match=r"floating scalars.*rows"):
    step(make_state(), batches[0])


# A loss that reduces itself over the axis.


def mean_of_means(x, axes):
  return jax.lax.pmean(jnp.mean(x), axes)


def sum_over_count(x, axes):
  return jax.lax.psum(jnp.sum(x), axes) / jax.lax.psum(x.size, axes)


def mean_of_all(x, axes):
  for axis in axes if isinstance(axes, tuple) else (axes,):
    x = jax.lax.all_gather(x, axis)
  return jnp.mean(x)


SQUARES = np.arange(16.0).reshape(16, 1) / 4 + 0.5


class Weight(nnx.Module):
  def __init__(self, w):
    self.w = nnx.Param(w)


def gradient_of_squares(face, axes, reduced, **options):
  """What an update of rate 1 takes off the weight, a face of the engine."""
  ascent = fsam_optax.friendly_perturbation(0.0)
  options = {"axis_name": axes, **options}
  loss = lambda w, x: reduced((x * w) ** 2)
  if face == "value_and_grad":
    fn = fsam_optax.value_and_grad(loss, ascent, **options)
    return lambda w, x: fn(w, ascent.init(w), x)[1]
  if face == "make_train_step":
    step = fsam_optax.make_train_step(
      lambda p, s, x, r: (loss(p["w"], x), (s, {})), jit=False, **options
    )
    create = lambda w: fsam_optax.TrainState.create(
      apply_fn=None, params={"w": w}, tx=optax.sgd(1.0), perturbation=ascent
    )
    return lambda w, x: w - step(create(w), x)[0].params["w"]

  def of_nnx(w, x):
    model = Weight(w)
    optimizer = fsam_optax.nnx.Optimizer(
      model, optax.sgd(1.0), wrt=nnx.Param, perturbation=ascent
    )
    fn = optimizer.value_and_grad(lambda m, x: loss(m.w[...], x), **options)
    return fn(model, x)[1]["w"][...]

  return of_nnx


@pytest.mark.parametrize(
  "reduced", [mean_of_means, sum_over_count, mean_of_all]
)
@pytest.mark.parametrize("over", ["a", "b", ("a", "b")])
@pytest.mark.parametrize(
  ("face", "options"),
  [
    ("value_and_grad", {}),
    ("value_and_grad", {"num_microbatches": 2}),
    ("make_train_step", {}),
    ("nnx", {}),
  ],
)
def test_a_loss_that_reduces_itself_is_that_of_all_rows(
  reduced, over, face, options
):
  """Under the default check, where a gradient knows what it varies along."""
  mesh = make_mesh(a=2, b=4)
  gradient = gradient_of_squares(
    face, ("a", "b"), lambda x: reduced(x, over), **options
  )
  found = jax.jit(
    jax.shard_map(
      gradient,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(("a", "b"))),
      out_specs=PartitionSpec(),
    )
  )(jnp.array([3.0]), jnp.asarray(SQUARES))
  np.testing.assert_allclose(found, [2 * 3 * np.mean(SQUARES**2)], rtol=1e-10)


def test_some_axes_of_a_mesh_alone_are_manual_with_parts_of_the_batch():
  mesh = make_mesh(a=2, b=4)
  gradient = gradient_of_squares(
    "value_and_grad", "b", jnp.mean, num_microbatches=2
  )
  found = jax.jit(
    jax.shard_map(
      gradient,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec("b")),
      out_specs=PartitionSpec(),
      axis_names={"b"},
    )
  )(jnp.array([3.0]), jnp.asarray(SQUARES))
  np.testing.assert_allclose(found, [2 * 3 * np.mean(SQUARES**2)], rtol=1e-10)


def test_a_step_that_averages_over_no_axis_is_not_mapped():
  step = step_of()
  with pytest.raises(ValueError, match="`step` must average over the axes"):
    sharding.shard_map_step(step, make_mesh(batch=8), check_vma=False)
  with pytest.raises(ValueError, match="axis_name='group', jit=False"):
    sharding.group_step(step, 2, "group")

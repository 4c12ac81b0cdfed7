"""The step of a run: that of the recipe, on any devices, with every option."""

from by_hand import assert_same_bits
import chex
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import pytest
from small_program import MEAN
from small_program import STANDARD_DEVIATION
from small_program import images_of
from small_program import program_of
from small_program import settings_of

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.train import batches
from fsam_optax.experiments.train import flag_checks
from fsam_optax.experiments.train import program as program_lib
from fsam_optax.experiments.train.run_state import MEANS
from fsam_optax.experiments.train.run_state import RunState


def stream_of(mesh, x, y, start, stop):
  return batches.stream(
    x, y, mesh, seed=0, batch_size=16, start=start, stop=stop
  )


def train(program, steps=6):
  """A few steps on rows of noise: the progress and the metrics."""
  images = images_of()
  progress = program.place(program.create(0))
  step = program.lower_step().compile()
  stream = stream_of(program.mesh, images.x_train, images.y_train, 0, steps)
  every = []
  for batch in stream:
    progress, metrics = step(progress, batch)
    every.append(jax.tree.map(np.asarray, metrics))
  return progress, every


def test_every_epoch_is_a_permutation_and_a_later_start_sees_the_same():
  rows_of = lambda number, seed: batches.rows_of(number, seed, 50, 16)
  epochs = [
    np.concatenate([rows_of(3 * epoch + i, 3) for i in range(3)])
    for epoch in range(3)
  ]
  for epoch in epochs:
    assert len({*epoch.tolist()}) == 48
  assert not np.array_equal(epochs[0], epochs[1])
  assert not np.array_equal(rows_of(7, 4), rows_of(7, 3))
  x = np.arange(50, dtype=np.float32).reshape(50, 1, 1, 1)
  y = np.arange(50, dtype=np.int32)
  found = list(stream_of(make_mesh(), x, y, 2, 7))
  assert len(found) == 5
  for number, batch in zip(range(2, 7), found, strict=True):
    np.testing.assert_array_equal(batch["label"], rows_of(number, 0))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])
    assert len(batch["label"].sharding.device_set) == 8


def test_means_weigh_rows_leave_out_what_was_skipped_and_begin_anew():
  progress = RunState.begin(None, jnp.float32)
  assert np.isnan(progress.means()["loss"])
  counts = []
  steps = ((1.0, 4, 0), (np.inf, 4, 1), (4.0, 2, 0), (7.0, 4, 0))
  for loss, rows, skipped in steps:
    metrics = {name: jnp.float32(loss) for name in MEANS}
    metrics["skipped"] = jnp.int32(skipped)
    progress = progress.after(None, metrics, rows, steps_an_epoch=3)
    counts.append(int(progress.skipped))
    if len(counts) == 3:
      assert progress.means() == {name: 2.0 for name in MEANS}
  assert progress.means()["loss"] == 7
  assert counts == [0, 1, 1, 0]


def outcome(devices, **options):
  """What six steps in float64 come to."""
  program = program_of(devices=devices, **options)
  progress, metrics = train(program)
  assert metrics[-1]["sharpness"] != 0
  images, state = images_of(), progress.state
  leaves = jax.tree.leaves(state.params)
  return {
    "is_split": any(not x.sharding.is_fully_replicated for x in leaves),
    "arrays": jax.tree.map(
      np.asarray, (state.params, state.model_state, state.perturbation_state)
    ),
    "means": progress.means(),
    "evaluated": program.evaluator(16)(state, images.x_test, images.y_test),
  }


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_numbers(x64):
  one, eight = outcome(1, dtype="float64"), outcome(8, dtype="float64")
  # Conditioned by BatchNorm over few rows: six steps lose some digits.
  chex.assert_trees_all_close(eight, one, rtol=1e-7, atol=1e-10)


def test_fsdp_splits_the_kernels_and_a_device_can_ascend_by_itself(x64):
  # No BatchNorm, whose statistics a device takes of its own rows.
  cnn = {"model": "cnn", "depth": 2, "width": 32, "dtype": "float64"}
  one = outcome(1, **cnn)
  split = outcome(8, sharding="fsdp", **cnn)
  assert split.pop("is_split")
  assert not one.pop("is_split")
  chex.assert_trees_all_close(split, one, rtol=1e-9, atol=1e-11)
  local = outcome(8, sync_perturbation=False, **cnn)
  kernels = [x["arrays"][0]["Dense_0"]["kernel"] for x in (one, local)]
  assert not np.allclose(*kernels, rtol=1e-6)


def test_a_step_is_the_recipe_written_out():
  """SGD with momentum and coupled decay, on the augmented images."""
  ascent = settings_of().ascent
  assert (ascent.rho, ascent.lmbda) == (0.2, 0.95)
  program = program_of(optimizer="sgd", learning_rate=0.1)
  images = images_of()
  x, y = images.x_train[:16], images.y_train[:16]
  progress = program.place(program.create(0))
  before = jax.tree.map(np.asarray, progress.state.params)
  statistics = jax.tree.map(np.asarray, progress.state.model_state)
  stream = program_lib.AUGMENTATION_STREAM
  key = jax.random.fold_in(jax.random.fold_in(progress.state.rng, stream), 0)
  options = augmentation.Augmentation(crop_padding=1, cutout=3)
  draws = augmentation.draw(options, key, x.shape)
  moments = (np.full(3, z, np.float32) for z in (MEAN, STANDARD_DEVIATION))
  seen = augmentation.augment(options, draws, x, *moments)
  network = networks.REGISTRY["wide_resnet"].create(10, depth=10, width=1)

  def loss(params):
    logits, _ = network.apply(
      {"params": params, **statistics}, seen, train=True, mutable=True
    )
    return -jax.nn.log_softmax(logits)[np.arange(16), y].mean()

  expected, gradient = jax.jit(jax.value_and_grad(loss))(before)
  progress, metrics = jax.jit(program.step)(progress, {"image": x, "label": y})
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
  assert progress.means()["loss"] == pytest.approx(float(metrics["loss"]))
  assert int(progress.batches) == 1
  updated = jax.tree.map(
    lambda w, g: w - 0.1 * (g + 1e-3 * w), before, gradient
  )
  chex.assert_trees_all_close(
    progress.state.params, updated, rtol=1e-3, atol=1e-5
  )


def test_bfloat16_computes_in_it_and_keeps_the_parameters_in_float32():
  program = program_of(dtype="bfloat16")
  text = program.lower_step().as_text()
  convolutions = [x for x in text.splitlines() if "stablehlo.convolution" in x]
  assert convolutions
  assert all("bf16" in line for line in convolutions)
  dtypes = {x.dtype for x in jax.tree.leaves(program.abstract().state.params)}
  assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  ("changes", "has_ascent"),
  [
    ({"optimizer": "sgd"}, False),
    ({"optimizer": "sam", "adaptive": True}, True),
    ({"ascent_fraction": 0.25, "ema_gradient": "descent"}, True),
    ({"mask": "norms_only"}, True),
    ({"average": "optimizer", "lmbda": 0.9}, True),
    ({"skip_nonfinite": False}, True),
    ({"num_microbatches": 2, "sync_perturbation": False}, True),
    (
      {"model": "vgg", "depth": 11, "num_microbatches": 2}
      | {"images": images_of(size=32)},
      True,
    ),
    ({"model": "resnet", "depth": 10, "width": 4}, True),
  ],
)
def test_every_option_makes_a_step(changes, has_ascent):
  program = program_of(**changes)
  text = program.lower_step().as_text(debug_info=True)
  assert ("descent" in text) == has_ascent
  state = program.abstract().state
  assert (state.perturbation is not None) == has_ascent


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"start": "5", "stop": "4"}, "--stop: must leave some of the 6 steps"),
    ({"stop": "0", "every": 3}, "--stop: must leave some of the 6 steps"),
    ({"start": "3epochs"}, "--start: must leave some of the 6 steps"),
    ({"num_microbatches": 3}, "--num-microbatches: must divide the number of"),
    ({"mask": "norms_only", "model": "mlp"}, "--mask: must"),
    ({"sync_perturbation": False}, "--no-sync-perturbation: must have several"),
  ],
)
def test_what_the_library_refuses_is_named_by_its_flag(changes, message):
  with pytest.raises(FlagError, match=message):
    program_of(**changes).lower_step()


@pytest.mark.slow
def test_batches_whose_gate_is_shut_go_through_one_pass():
  # From the second epoch on, every second batch: the fourth and the sixth.
  program = program_of(every=2, start="1epochs", model="cnn", depth=2, width=4)
  progress, metrics = train(program)
  has_ascent = [float(m["perturbation_norm"]) > 0 for m in metrics]
  assert has_ascent == [False, False, False, True, False, True]
  assert int(progress.state.step) == int(progress.batches) == 6


def test_learning_rate_is_the_cosine_of_the_authors():
  program = program_of(epochs=200)
  at, steps = np.array([0, 1, 2, 3, 300, 599, 600]), 600
  expected = 0.05 * 0.5 * (1 + np.cos(at / steps * np.pi))
  found = jax.jit(program.learning_rate)(at)
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_initialization_is_that_of_the_authors_framework():
  network = networks.REGISTRY["resnet"].create(10, width=16, depth=10)
  params = jax.jit(lambda: network.init(
    jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
  )["params"])()  # fmt: skip
  kernel = np.asarray(params["Conv_4"]["kernel"])
  # Uniform between plus and minus one over the root of the inputs.
  bound = 1 / np.prod(kernel.shape[:-1]) ** 0.5
  assert 0.98 * bound < abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)


@pytest.mark.parametrize(
  ("flags", "expected"),
  [
    (
      {"optimizer": "sam", "adaptive": True},
      fsam_optax.sam_perturbation(0.2, adaptive=True),
    ),
    (
      {"rho": 0.5, "mask": "exclude_biases_and_norms"},
      fsam_optax.friendly_perturbation(
        *(0.5, 1.0, 0.95), mask=fsam_optax.masks.exclude_biases_and_norms
      ),
    ),
  ],
  ids=["sam", "fsam"],
)
def test_an_ascent_by_flags_is_that_of_the_library(flags, expected):
  settings = settings_of(model="mlp", batch_size=16, crop_padding=1, **flags)
  config = flag_checks.config_of(settings, images_of())
  params = {"Conv": {"kernel": jnp.eye(2), "bias": jnp.ones(2)}}
  found, wanted = (
    x.update(params, x.init(params), params)
    for x in (program_lib.perturbation(config), expected)
  )
  assert_same_bits(found, wanted)

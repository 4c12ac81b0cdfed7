"""The step of a run: that of the recipe, on any devices, with every option."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import numpy_augmentation
from numpy_augmentation import MEAN
from numpy_augmentation import STANDARD_DEVIATION
import pytest
from small_program import images_of
from small_program import mesh_of
from small_program import network_of
from small_program import program_of

from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.train import batches
from fsam_optax.experiments.train import means
from fsam_optax.experiments.train.evaluation import evaluator


def train(program, steps=6):
  """A few steps on rows of noise: the progress, the sums and the metrics."""
  x, y = images_of(48)
  order = batches.Order(48, 16, drop_last=True, seed=0)
  progress, sums = program.place(program.create(0)), program.sums()
  compiled = {
    ascends: program.lower_step(16, ascends=ascends).compile()
    for ascends in {program.ascends(number) for number in range(steps)}
  }
  stream = batches.Batches(order, x, y, program.mesh, start=0, stop=steps)
  every = []
  for number, batch in enumerate(stream):
    step = compiled[program.ascends(number)]
    progress, sums, metrics = step(progress, sums, batch)
    every.append(jax.tree.map(np.asarray, metrics))
  return progress, sums, every


def arrays_of(progress):
  """All that was trained, in one process."""
  state = progress.state
  return jax.tree.map(
    np.asarray, (state.params, state.model_state, state.perturbation_state)
  )


def assert_close(one, other, **tolerance):
  compare = lambda x, y: np.testing.assert_allclose(x, y, **tolerance)
  jax.tree.map(compare, one, other)


# No BatchNorm, whose statistics a device by itself takes of its own rows; wide
# enough for FSDP to split its kernels.
CNN = {"model": "cnn", "depth": 2, "width": 32, "dtype": "float64"}


@functools.cache
def outcome(devices, **options):
  """What six steps in float64 come to."""
  program = program_of(mesh_of(devices), **options)
  progress, sums, metrics = train(program)
  assert metrics[-1]["sharpness"] != 0
  x, y = images_of(20)
  found = {
    "arrays": arrays_of(progress),
    "means": means.finish(sums),
    "evaluated": evaluator(program, 16)(progress.state, x, y),
  }
  leaves = jax.tree.leaves(progress.state.params)
  is_split = any(not x.sharding.is_fully_replicated for x in leaves)
  return found, is_split


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_numbers(x64):
  one, eight = outcome(1, dtype="float64"), outcome(8, dtype="float64")
  # Conditioned by BatchNorm over few rows: six steps lose some digits.
  assert_close(eight[0], one[0], rtol=1e-7, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["fsdp", "shard_map"])
def test_every_sharding_gives_the_numbers_of_one_device(sharding, x64):
  one, _ = outcome(1, **CNN)
  eight, is_split = outcome(8, sharding=sharding, **CNN)
  assert_close(eight, one, rtol=1e-9, atol=1e-11)
  assert is_split == (sharding == "fsdp")


def test_a_device_can_ascend_along_a_gradient_of_its_own(x64):
  one, _ = outcome(1, **CNN)
  local, _ = outcome(8, sharding="shard_map", sync_perturbation=False, **CNN)
  kernels = [x["arrays"][0]["Dense_0"]["kernel"] for x in (one, local)]
  assert not np.allclose(*kernels, rtol=1e-6)


def test_a_step_is_the_recipe_written_out():
  """SGD with momentum and coupled decay, on the images of the NumPy program."""
  program = program_of(mesh_of(1), optimizer="sgd", learning_rate=0.1)
  x, y = images_of(16)
  progress = program.place(program.create(0))
  before = jax.tree.map(np.asarray, progress.state.params)
  statistics = jax.tree.map(np.asarray, progress.state.model_state)
  key = jax.random.fold_in(jax.random.fold_in(progress.state.rng, 2**32 - 1), 0)
  options = augmentation.Augmentation(crop_padding=1, cutout=3)
  images = numpy_augmentation.augment(
    options,
    jax.tree.map(np.asarray, augmentation.draw(options, key, x.shape)),
    x,
    MEAN[0],
    STANDARD_DEVIATION[0],
  ).astype(np.float32)
  network = network_of("wide_resnet", 10, depth=10, width=1)

  def loss(params):
    logits, _ = network.apply(
      {"params": params, **statistics},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    return -jax.nn.log_softmax(logits)[np.arange(16), y].mean()

  expected, gradient = jax.jit(jax.value_and_grad(loss))(before)
  progress, sums, metrics = jax.jit(program.step)(
    progress, program.sums(), {"image": x, "label": y}
  )
  np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
  assert means.finish(sums)["loss"] == pytest.approx(float(metrics["loss"]))
  assert int(progress.batches) == 1
  jax.tree.map(
    lambda after, w, g: np.testing.assert_allclose(
      after, w - 0.1 * (g + 1e-3 * w), rtol=1e-3, atol=1e-5
    ),
    progress.state.params,
    before,
    gradient,
  )


def test_bfloat16_computes_in_it_and_keeps_the_parameters_in_float32():
  program = program_of(mesh_of(1), dtype="bfloat16")
  text = program.lower_step(16).as_text()
  convolutions = [x for x in text.splitlines() if "stablehlo.convolution" in x]
  assert convolutions
  assert all("bf16" in line for line in convolutions)
  dtypes = {x.dtype for x in jax.tree.leaves(program.abstract().state.params)}
  assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  ("changes", "has_ascent"),
  [
    ({"optimizer": "sgd"}, False),
    ({"optimizer": "sam", "adaptive": True, "eta": 0.01}, True),
    ({"ascent_fraction": 0.25, "ema_gradient": "descent"}, True),
    ({"order": "paper", "mask": "norms_only"}, True),
    ({"accumulator_dtype": "bfloat16", "skip_nonfinite": False}, True),
    ({"num_microbatches": 2, "sync_perturbation": False}, True),
    ({"model": "vgg", "depth": 11, "num_microbatches": 2, "size": 32}, True),
    ({"model": "resnet", "depth": 10, "width": 4}, True),
    ({"label_smoothing": 0.1, "nesterov": True}, True),
  ],
)
def test_every_option_makes_a_step(changes, has_ascent):
  program = program_of(mesh_of(1), **changes)
  text = program.lower_step(16).as_text(debug_info=True)
  assert ("descent" in text) == has_ascent
  state = program.abstract().state
  assert (state.perturbation is not None) == has_ascent


@pytest.mark.slow
def test_gated_batches_go_through_one_pass_which_feeds_the_average():
  # From the second epoch on, every second batch: the fourth and the sixth.
  options = {"model": "cnn", "depth": 2, "width": 4}
  program = program_of(mesh_of(1), every=2, start="1epochs", **options)
  gates = [program.ascends(number) for number in range(6)]
  assert gates == [False, False, False, True, False, True]
  progress, _, metrics = train(program)
  assert [float(m["perturbation_norm"]) > 0 for m in metrics] == gates
  text = program.lower_step(16, ascends=False).as_text(debug_info=True)
  assert "descent" not in text
  assert int(progress.state.step) == int(progress.batches) == 6
  # Before the first ascent SGD trains, and the average is under way.
  before, _, _ = train(program, steps=3)
  sgd, _, _ = train(program_of(mesh_of(1), optimizer="sgd", **options), steps=3)
  assert_close(before.state.params, sgd.state.params, rtol=1e-4, atol=1e-6)
  averages = jax.tree.leaves(before.state.perturbation_state)
  assert max(np.abs(x).max() for x in averages if x.ndim) > 0


def test_a_batch_of_sgd_never_ascends():
  program = program_of(mesh_of(1), optimizer="sgd")
  assert not program.ascends(0)


def test_no_ascent_at_all_needs_one_program():
  program = program_of(mesh_of(1), stop="0")
  assert {program.ascends(number) for number in range(6)} == {False}

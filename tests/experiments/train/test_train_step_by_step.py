"""``train``: augmentation, order, noise, models and numbers, without a run."""

import json
import pathlib

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest

import fsam_optax
from fsam_optax.__main__ import main
from fsam_optax.experiments import augmentation
from fsam_optax.experiments import batches
from fsam_optax.experiments import label_noise
from fsam_optax.experiments import paper_recipes
from fsam_optax.experiments import program
from fsam_optax.experiments import resnet
from fsam_optax.experiments import run_folder

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
DEVIATION = np.array([0.2023, 0.1994, 0.2010], np.float32)


def numpy_augment(options, draws, images, mean, deviation):
  """As the authors' transforms do it: one image and one pixel at a time."""
  result = np.empty(images.shape, np.float64)
  scale = 255 if images.dtype == np.uint8 else 1
  for i, image in enumerate(images):
    height, width, _ = image.shape
    p = options.crop_padding
    if options.flip and draws.is_flipped[i]:
      image = image[:, ::-1]
    framed = np.zeros((height + 2 * p, width + 2 * p, image.shape[2]))
    framed[p : p + height, p : p + width] = image
    down, right = draws.offset[i]
    cropped = framed[down : down + height, right : right + width]
    normal = (cropped / scale - mean) / deviation
    if draws.is_cut[i]:
      down, right = draws.corner[i]
      for y in range(max(0, down), min(height, down + options.cutout)):
        for x in range(max(0, right), min(width, right + options.cutout)):
          normal[y, x] = 0
    result[i] = normal
  return result


@pytest.mark.parametrize(
  "options",
  [
    augmentation.Augmentation(),
    augmentation.Augmentation(cutout_probability=1.0, cutout=7),
    augmentation.Augmentation(flip=False, crop_padding=0),
    augmentation.Augmentation(cutout=0, cutout_probability=0.0),
  ],
  ids=["paper", "always cut", "cut only", "no cut"],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_augmentation_is_that_of_a_plain_numpy_program(options, dtype):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (24, 32, 32, 3)).astype(dtype)
  draws = augmentation.draw(options, jax.random.key(1), images.shape)
  found = jax.jit(
    lambda draws, images: augmentation.augment(
      options, draws, images, MEAN, DEVIATION
    )
  )(draws, images)
  assert found.dtype == jnp.float32
  expected = numpy_augment(
    options, jax.tree.map(np.asarray, draws), images, MEAN, DEVIATION
  )
  np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_draws_have_the_frequencies_of_the_recipe():
  rows = 40_000
  draws = augmentation.draw(
    augmentation.Augmentation(), jax.random.key(0), (rows, 32, 32, 3)
  )
  four_errors = 4 * 0.5 / rows**0.5
  assert abs(draws.is_flipped.mean() - 0.5) < four_errors
  assert abs(draws.is_cut.mean() - 0.5) < four_errors
  for drawn, low, high in ((draws.offset, 0, 9), (draws.corner, -8, 24)):
    for axis in range(2):
      counts = np.bincount(np.asarray(drawn[:, axis]) - low)
      expected = rows / (high - low)
      assert len(counts) == high - low
      # The mean of this sum is one less than the values, as chi square's is.
      chi_square = ((counts - expected) ** 2 / expected).sum()
      assert chi_square < (high - low) + 5 * (2 * (high - low)) ** 0.5
  assert abs(np.corrcoef(draws.offset.T)[0, 1]) < 4 / rows**0.5


def test_draws_do_not_depend_on_the_devices():
  mesh = fsam_optax.make_mesh()
  images = np.random.default_rng(0).integers(
    0, 256, (16, 32, 32, 3), dtype=np.uint8
  )
  options = augmentation.Augmentation()

  @jax.jit
  def augment(images):
    draws = augmentation.draw(options, jax.random.key(3), images.shape)
    return draws, augmentation.augment(options, draws, images, MEAN, DEVIATION)

  one = augment(images)
  many = augment(
    jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
  )
  jax.tree.map(np.testing.assert_array_equal, one, many)


def test_learning_rate_is_the_cosine_of_the_authors():
  config = paper_recipes.RECIPES["cifar100-resnet18"].config
  steps = config.epochs * 391
  rate = jax.jit(program.learning_rate_of(config, steps))
  at = np.array([0, 1, 390, 391, 39_099, 78_199, 78_200])
  expected = 0.05 * 0.5 * (1 + np.cos(at / steps * np.pi))
  np.testing.assert_allclose(rate(at), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
  ("recipe", "count"),
  [
    ("cifar10-resnet18", 11_173_962),
    ("cifar100-resnet18", 11_220_132),
    ("cifar100-vgg16bn", 15_299_748),
    ("cifar100-wrn28x10", 36_536_884),
  ],
)
def test_parameters_are_those_of_the_standard_network(recipe, count):
  dataset, config = paper_recipes.RECIPES[recipe]
  network = program.network_of(config, int(dataset.removeprefix("cifar")))
  variables = jax.eval_shape(
    lambda: network.init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
    )
  )
  sizes = [x.size for x in jax.tree.leaves(variables["params"])]
  assert sum(sizes) == count


def test_initialisation_is_that_of_the_authors_framework():
  network = program.network_of(paper_recipes.Config(width=16, depth=10), 10)
  assert isinstance(network, resnet.ResNet)
  params = jax.jit(lambda: network.init(
    jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False
  )["params"])()  # fmt: skip
  kernel = np.asarray(params["Conv_4"]["kernel"])
  # Uniform between plus and minus one over the root of the inputs.
  bound = 1 / np.prod(kernel.shape[:-1]) ** 0.5
  assert 0.98 * bound < abs(kernel).max() <= bound
  np.testing.assert_allclose(kernel.std(), bound / 3**0.5, rtol=0.05)


def test_every_epoch_is_a_permutation_and_a_later_start_sees_the_same():
  plan = batches.Plan(50, 16, drop_last=False, seed=3)
  assert (plan.steps_an_epoch, plan.last_size) == (4, 2)
  epochs = [
    np.concatenate([plan.rows_of(4 * epoch + i) for i in range(4)])
    for epoch in range(3)
  ]
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
  assert not np.array_equal(epochs[0], epochs[1])
  again = batches.Plan(50, 16, drop_last=False, seed=3)
  np.testing.assert_array_equal(again.rows_of(9), plan.rows_of(9))
  other = batches.Plan(50, 16, drop_last=False, seed=4)
  assert not np.array_equal(other.rows_of(9), plan.rows_of(9))
  dropping = batches.Plan(50, 16, drop_last=True, seed=3)
  assert (dropping.steps_an_epoch, dropping.last_size) == (3, 0)


def test_batches_come_in_order_and_their_wait_is_counted():
  x = np.arange(48, dtype=np.float32).reshape(48, 1, 1, 1)
  y = np.arange(48, dtype=np.int32)
  plan = batches.Plan(48, 16, drop_last=False, seed=0)
  mesh = fsam_optax.make_mesh()
  stream = batches.Batches(plan, x, y, mesh, start=2, stop=7)
  found = list(stream)
  assert len(found) == 5
  for number, batch in zip(range(2, 7), found, strict=True):
    rows = plan.rows_of(number)
    np.testing.assert_array_equal(batch["label"], rows)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], rows)
    assert len(batch["label"].sharding.device_set) == 8
  assert stream.waited > 0


def test_label_noise_of_each_kind():
  labels = np.arange(20_000, dtype=np.int32) % 10
  symmetric = label_noise.corrupt(labels, 10, 0.5, "symmetric", seed=0)
  # One in ten of the half that was drawn anew is right again.
  assert abs((symmetric != labels).mean() - 0.45) < 4 * (0.09 / 20_000) ** 0.5
  targets = np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1])
  asymmetric = label_noise.corrupt(
    labels, 10, 0.5, "asymmetric", seed=0, targets=targets
  )
  moved = asymmetric != labels
  np.testing.assert_array_equal(asymmetric[moved], targets[labels[moved]])
  assert set(labels[moved]) == {2, 3, 4, 5, 9}
  assert abs(moved[labels == 2].mean() - 0.5) < 0.05
  cyclic = label_noise.corrupt(labels, 10, 1.0, "asymmetric", seed=0)
  np.testing.assert_array_equal(cyclic, (labels + 1) % 10)
  again = label_noise.corrupt(labels, 10, 0.5, "symmetric", seed=0)
  np.testing.assert_array_equal(again, symmetric)
  assert (label_noise.corrupt(labels, 10, 0.5, "symmetric", 1) != again).any()
  np.testing.assert_array_equal(labels, np.arange(20_000) % 10)


def small_program(mesh, **changes):
  config = paper_recipes.Config(
    **{
      "model": "wide_resnet",  # That with the fewest layers to compile.
      "depth": 10,
      "width": 1,
      "epochs": 2,
      "batch_size": 16,
      "crop_padding": 1,
      "cutout": 3,
      **changes,
    }
  )
  shapes = program.Shapes((8, 8, 3), np.dtype(np.uint8), 10, 3, 0)
  return program.Program(
    config, shapes, mesh, mean=MEAN[0], deviation=DEVIATION[0]
  )


def mesh_of(number):
  return jax.make_mesh(
    (number,),
    ("batch",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:number],
  )


def images_of(number):
  rng = np.random.default_rng(0)
  x = rng.integers(0, 256, (number, 8, 8, 3), dtype=np.uint8)
  return x, rng.integers(0, 10, number).astype(np.int32)


def test_one_and_eight_devices_give_the_same_numbers(x64):
  x, y = images_of(48)
  plan = batches.Plan(48, 16, drop_last=True, seed=0)
  results = []
  for number in (1, 8):
    mesh = mesh_of(number)
    built = small_program(mesh, dtype="float64")
    progress = fsam_optax.place_state(built.create(0), mesh)
    step = built.lower_step(16).compile()
    stream = batches.Batches(plan, x, y, mesh, start=0, stop=6)
    for batch in stream:
      progress, metrics = step(progress, batch)
    assert metrics["sharpness"] != 0
    evaluated = built.evaluator(16)(progress.state, x[:20], y[:20])
    results.append(
      {
        "params": progress.state.params,
        "statistics": progress.state.model_state,
        "average": progress.state.perturbation_state,
        "means": program.means(progress),
        "evaluated": evaluated,
      }
    )
  # Conditioned by BatchNorm over few rows: six steps lose some digits.
  jax.tree.map(
    lambda one, eight: np.testing.assert_allclose(
      one, eight, rtol=1e-7, atol=1e-10
    ),
    *results,
  )


def test_a_step_is_the_recipe_written_out():
  """SGD with momentum and coupled decay, on the images of the NumPy program."""
  mesh = mesh_of(1)
  built = small_program(mesh, optimizer="sgd", learning_rate=0.1)
  x, y = images_of(16)
  progress = fsam_optax.place_state(built.create(0), mesh)
  before = jax.tree.map(np.asarray, progress.state.params)
  statistics = jax.tree.map(np.asarray, progress.state.model_state)
  key = jax.random.fold_in(jax.random.fold_in(progress.state.rng, 2**32 - 1), 0)
  options = augmentation.Augmentation(crop_padding=1, cutout=3)
  images = numpy_augment(
    options,
    jax.tree.map(np.asarray, augmentation.draw(options, key, x.shape)),
    x,
    MEAN[0],
    DEVIATION[0],
  ).astype(np.float32)
  network = program.network_of(built.config, 10)

  def loss(params):
    logits, _ = network.apply(
      {"params": params, **statistics},
      images,
      train=True,
      mutable=["batch_stats"],
    )
    return -jax.nn.log_softmax(logits)[np.arange(16), y].mean()

  gradient = jax.jit(jax.grad(loss))(before)
  progress, metrics = jax.jit(built.step)(progress, {"image": x, "label": y})
  np.testing.assert_allclose(metrics["loss"], loss(before), rtol=1e-4)
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
  built = small_program(mesh_of(1), dtype="bfloat16")
  text = built.lower_step(16).as_text()
  convolutions = [x for x in text.splitlines() if "stablehlo.convolution" in x]
  assert convolutions
  assert all("bf16" in line for line in convolutions)
  dtypes = {x.dtype for x in jax.tree.leaves(built.abstract().state.params)}
  assert dtypes == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
  ("changes", "has_ascent"),
  [
    ({"optimizer": "sgd"}, False),
    ({"optimizer": "sam", "adaptive": True}, True),
    ({"ascent_fraction": 0.25, "ema_gradient": "descent"}, True),
    ({"model": "vgg", "depth": 11, "microbatches": 2}, True),
    ({"model": "resnet", "depth": 10, "width": 4}, True),
    ({"label_smoothing": 0.1, "nesterov": True}, True),
  ],
)
def test_every_option_makes_a_step(changes, has_ascent):
  mesh = mesh_of(1)
  config = small_program(mesh, **changes).config
  size = 32 if config.model == "vgg" else 8
  built = program.Program(
    config,
    program.Shapes((size, size, 3), np.dtype(np.uint8), 10, 3, 0),
    mesh,
    mean=0.5,
    deviation=0.25,
  )
  text = built.lower_step(16).as_text(debug_info=True)
  assert ("descent" in text) == has_ascent
  state = built.abstract().state
  assert (state.perturbation is not None) == has_ascent


def test_checksum_sees_a_bit_a_swap_and_a_loss_but_no_sharding():
  mesh = fsam_optax.make_mesh()
  rng = np.random.default_rng(0)
  tree = {
    "w": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
    "key": jax.random.key(0),
    "n": jnp.int32(3),
  }
  found = program.checksum(tree)
  assert found.dtype == jnp.uint32
  assert found.shape == (4,)
  for changed in (
    tree["w"].at[3, 2].add(1e-6),
    tree["w"].at[3, 2].set(0),
    tree["w"][::-1],
    tree["w"].at[0, 0].multiply(-1),
  ):
    assert (program.checksum({**tree, "w": changed}) != found).any()
  sharded = jax.device_put(
    tree["w"], NamedSharding(mesh, PartitionSpec("batch"))
  )
  np.testing.assert_array_equal(program.checksum({**tree, "w": sharded}), found)


def test_a_line_that_a_full_disk_refuses_is_an_error(tmp_path):
  journal = run_folder.Journal(tmp_path / "metrics.jsonl", 0)
  journal._path = pathlib.Path("/dev/full")
  with pytest.raises(run_folder.FolderError, match=r"No space left.*full disk"):
    journal.append({"batches": 1})
  assert not journal.lines


def error_of(capsys, *flags):
  with pytest.raises(SystemExit) as error:
    main(["train", *flags])
  assert error.value.code == 2
  return capsys.readouterr().err


def test_bad_flags_are_named_with_the_remedy(capsys, tmp_path):
  output = f"--output={tmp_path / 'run'}"
  digits = ("--data=digits", output)
  for flags, message in (
    ((), "--data: must be given: the path of cifar-100-binary.tar.gz"),
    (("--depth=12",), "--depth: must be 8 n + 2, such as 10 or 18, for resnet"),
    (("--model=vgg", "--depth=12"), "--depth: must be one of 11, 13, 16, 19"),
    (("--model=wide_resnet", "--depth=11"), "--depth: must be 6 n + 4"),
    (("--learning-rate=0",), "--learning-rate: must be positive, got 0"),
    (("--ascent-fraction=0",), "--ascent-fraction: must be positive, got 0"),
    (("--rho=-1",), "--rho: must be a finite number, 0 or more, got '-1'"),
    (("--momentum=1",), "--momentum: must be a number in [0, 1), got '1'"),
    (("--mean=a,b",), "--mean: must be numbers with commas between"),
    (("--deviation=0",), "--deviation: must be positive"),
    (("--optimizer=adam",), "--optimizer: invalid choice: 'adam'"),
    (("--nesterov", "--momentum=0"), "--nesterov: must have a --momentum"),
    ((f"--data={tmp_path}/no.npz",), "--data: must be a file that exists"),
    ((f"--data={tmp_path}/no",), "--data: must be a folder or an archive"),
    ((*digits, "--mean=1,2,3"), "--mean: must be one number, or one for each"),
    ((*digits, "--model=vgg"), "--model: vgg must have images of 32 x 32"),
    ((*digits, "--validation=1297"), "--validation: must be below the 1297"),
    ((*digits, "--batch-size=1298"), "--batch-size: must be at most the 1297"),
    ((*digits, "--batch-size=20"), "--batch-size: must split evenly over 8"),
    (
      (*digits, "--devices=1", "--microbatches=3"),
      "--microbatches must divide the number of rows of the batch, got 3",
    ),
    (
      (*digits, "--devices=1", "--ascent-fraction=0.125"),
      "--drop-last leaves out the last rows of an epoch",
    ),
    (digits, "--drop-last: must be given where the last 17 rows"),
    ((*digits, "--devices=9"), "--devices: must be at most 8, got 9"),
  ):
    assert message in error_of(capsys, *flags), flags
  assert not (tmp_path / "run" / "seed-1").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
  output = tmp_path / "run"
  main(
    [
      *("train", "--recipe=cifar10-resnet18", "--dry-run", "--devices=1"),
      *(f"--output={output}", "--depth=10", "--width=4", "--epochs=20"),
    ]
  )
  printed = capsys.readouterr().out
  assert "cifar10, not read: 50,000 to train on, 10,000 to evaluate" in printed
  network = program.network_of(paper_recipes.Config(depth=10, width=4), 10)
  variables = jax.eval_shape(
    lambda: network.init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
    )
  )
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert f"depth 10, width 4: {count:,} parameters, float32" in printed
  assert "391 an epoch, 7,820 in 20 epochs, 128 rows and 2 gradients" in printed
  assert "--rho 0.2 --sigma 1.0 --lmbda 0.95" in printed
  for name in ("memory", "cost"):
    (line,) = (x for x in printed.splitlines() if x.startswith(name))
    number = float(line.split()[1].replace(",", ""))
    assert number > 0
  assert not output.exists()


def test_a_short_run_on_real_digits_learns(capsys, tmp_path):
  """In this process, on 8 devices."""
  flags = [
    *("train", "--data=digits", f"--output={tmp_path}", "--tensorboard"),
    *("--model=wide_resnet", "--depth=10", "--width=1", "--batch-size=64"),
    *("--drop-last", "--cutout=0", "--crop-padding=0", "--no-flip"),
    *("--epochs=3", "--log-every=7", "--validation=97", "--rho=0.05"),
  ]
  main(flags)
  printed = capsys.readouterr().out
  assert "on 8 devices" in printed
  assert "validation accuracy" in printed
  assert "waiting for data" in printed
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["evaluated"] == "validation"
  assert summary["standard_error"] is None
  assert summary["mean"] > 60  # Of ten classes.
  assert list((tmp_path / "seed-1" / "tensorboard").iterdir())

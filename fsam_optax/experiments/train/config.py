"""The settings of ``train``: its flags, and the data that they ask for."""

import argparse
import math
import pathlib
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from fsam_optax import _parallel
from fsam_optax._rows import check_batch
from fsam_optax.experiments import batches as batches_lib
from fsam_optax.experiments import cifar
from fsam_optax.experiments import data
from fsam_optax.experiments import images as images_lib
from fsam_optax.experiments import label_noise
from fsam_optax.experiments import paper_recipes
from fsam_optax.experiments import program as program_lib
from fsam_optax.experiments import settings
from fsam_optax.experiments.paper_recipes import Config


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the command."""
  default = Config()
  add = parser.add_argument
  add(
    "--recipe",
    choices=sorted(paper_recipes.RECIPES),
    default="cifar100-resnet18",
    help="a data set and a network; default cifar100-resnet18",
  )
  add(
    "--data",
    metavar="PATH",
    help="the binary version of the recipe's CIFAR, its .tar.gz or its folder; "
    "or a folder of images with train/CLASS/ and test/CLASS/; or an .npz with "
    "x_train, y_train, x_test and y_test; or mnist or digits, the small sets "
    "in packages",
  )
  add(
    "--output",
    type=pathlib.Path,
    metavar="DIR",
    help="folder of the run, from whose last checkpoint it goes on; default "
    "runs/RECIPE-OPTIMIZER",
  )
  add(
    "--dry-run",
    action="store_true",
    help="print the plan, the parameters, the memory and the cost, and end",
  )

  add = parser.add_argument_group("optimizer").add_argument
  positive = settings.number(0, math.inf, remedy="write a number such as 0.05")
  share = settings.number(0, 1, remedy="write a share such as 0.5")
  below = settings.number(0, 1, below=True, remedy="write a share such as 0.4")
  count = settings.integer(1, 10**9, remedy="write a whole number")
  natural = settings.integer(0, 10**9, remedy="write a whole number")
  _add(add, "--optimizer", default, choices=paper_recipes.OPTIMIZERS)
  _add(add, "--rho", default, type=positive, help="radius of the perturbation")
  _add(add, "--sigma", default, type=positive, help="share that is subtracted")
  _add(add, "--lmbda", default, type=share, help="decay of the average")
  _add(
    add,
    "--adaptive",
    default,
    action=argparse.BooleanOptionalAction,
    help="a radius in ASAM's metric",
  )
  _add(
    add,
    "--ascent-fraction",
    default,
    type=share,
    help="share of the rows that the ascent takes",
  )
  _add(
    add,
    "--ema-gradient",
    default,
    choices=("ascent", "descent"),
    help="which gradient feeds the average",
  )
  _add(add, "--learning-rate", default, type=positive)
  _add(add, "--momentum", default, type=below)
  _add(add, "--nesterov", default, action=argparse.BooleanOptionalAction)
  _add(add, "--weight-decay", default, type=positive)
  _add(add, "--label-smoothing", default, type=below)
  _add(add, "--epochs", default, type=count)
  _add(add, "--batch-size", default, type=count, help="of all devices together")
  _add(
    add,
    "--drop-last",
    default,
    action=argparse.BooleanOptionalAction,
    help="rows that fill no whole batch wait for another epoch",
  )
  _add(
    add,
    "--microbatches",
    default,
    type=count,
    help="parts of a batch that go through one at a time, in less memory",
  )

  add = parser.add_argument_group("network").add_argument
  _add(add, "--model", default, choices=paper_recipes.MODELS)
  _add(add, "--depth", default, type=count, help="layers")
  _add(
    add,
    "--width",
    default,
    type=count,
    help="channels of the first stage; of wide_resnet, the widening factor",
  )
  _add(add, "--dropout", default, type=below, help="of vgg")
  _add(
    add,
    "--dtype",
    default,
    choices=("float32", "bfloat16", "float64"),
    help="of the computation",
  )

  add = parser.add_argument_group("images").add_argument
  _add(
    add,
    "--flip",
    default,
    action=argparse.BooleanOptionalAction,
    help="mirror half of the images",
  )
  _add(add, "--crop-padding", default, type=natural, help="pixels")
  _add(add, "--cutout", default, type=natural, help="side, in pixels; 0 is off")
  _add(add, "--cutout-probability", default, type=share)
  channels = "of each channel in [0, 1]; CIFAR's, or of the training images"
  _add(add, "--mean", default, type=_numbers, metavar="R,G,B", help=channels)
  _add(
    add, "--deviation", default, type=_numbers, metavar="R,G,B", help=channels
  )
  _add(
    add,
    "--image-size",
    default,
    type=count,
    help="side to scale the files of a folder to, in pixels",
  )
  _add(
    add,
    "--label-noise",
    default,
    type=share,
    help="share of the training labels that are replaced",
  )
  _add(
    add,
    "--label-noise-kind",
    default,
    choices=label_noise.KINDS,
    help="by any class, or by one that is easily taken for it",
  )
  _add(
    add,
    "--validation",
    default,
    type=natural,
    help="training rows to evaluate on in the place of the test rows, which "
    "nothing may be chosen by",
  )

  add = parser.add_argument_group("run").add_argument
  add("--seeds", type=count, default=1, metavar="N", help="default 1")
  add("--first-seed", type=natural, default=1, metavar="SEED", help="default 1")
  add(
    "--save-every",
    type=count,
    metavar="STEPS",
    help="write a checkpoint so often, besides at the end of each epoch",
  )
  add(
    "--log-every",
    type=count,
    default=50,
    metavar="STEPS",
    help="write the metrics of a step so often; default 50",
  )
  add(
    "--evaluation-batch-size",
    type=count,
    default=1000,
    metavar="ROWS",
    help="default 1000",
  )
  add(
    "--tensorboard",
    action="store_true",
    help="write the metrics for TensorBoard, too",
  )
  add("--devices", type=count, metavar="N", help="use so many; default all")

  job = parser.add_argument_group("processes")
  job.add_argument(
    "--distributed", action="store_true", help="join a job as on a TPU pod"
  )
  job.add_argument(
    "--coordinator-address", metavar="HOST:PORT", help="of process 0"
  )
  job.add_argument("--num-processes", type=count, metavar="N")
  job.add_argument("--process-id", type=natural, metavar="I")


_OF_CIFAR = ("--mean", "--deviation")  # Other images have their own.


def _add(add, flag: str, default: Config, help: str = "", **kwargs) -> None:
  """A flag for a field of the configuration, None where it is not given."""
  value = getattr(default, flag[2:].replace("-", "_"))
  if isinstance(value, tuple):
    value = ",".join(map(str, value))
  if flag in ("--model", "--depth", "--width"):
    shown = "default the recipe's"
  elif value is None or isinstance(value, tuple) or flag in _OF_CIFAR:
    shown = ""
  elif isinstance(value, bool):
    shown = f"default {'yes' if value else 'no'}"
  else:
    shown = f"default {value}"
  add(
    flag,
    default=None,
    help="; ".join(part for part in (help, shown) if part),
    **kwargs,
  )


def _numbers(text: str) -> tuple[float, ...]:
  try:
    values = tuple(float(part) for part in text.split(","))
  except ValueError:
    values = (math.nan,)
  if not all(map(math.isfinite, values)):
    raise argparse.ArgumentTypeError(
      f"must be numbers with commas between, got {text!r}; for example "
      "0.5,0.5,0.5"
    )
  return values


def config_of(
  args: argparse.Namespace, parser: argparse.ArgumentParser
) -> Config:
  """The configuration of the recipe, with the flags that were given.

  Args:
    args: what the parser returned.
    parser: its ``error`` ends the program with status 2.

  Returns:
    The configuration.
  """
  recipe = paper_recipes.RECIPES[args.recipe]
  given = {
    name: value
    for name in Config._fields
    if (value := getattr(args, name)) is not None
  }
  config = recipe.config
  if given.get("model", config.model) != config.model:
    depth, width = {"resnet": (18, 64), "vgg": (16, 64)}.get(
      given["model"], (28, 10)
    )
    config = config._replace(depth=depth, width=width)
  config = config._replace(**given)

  def fail(flag, message) -> NoReturn:
    parser.error(f"argument {flag}: {message}")

  if must := program_lib.check_depth(config.model, config.depth):
    fail("--depth", f"must be {must}, got {config.depth}")
  for flag, value in (
    ("--learning-rate", config.learning_rate),
    ("--ascent-fraction", config.ascent_fraction),
  ):
    if value == 0:
      fail(flag, "must be positive, got 0")
  if config.deviation and min(config.deviation) <= 0:
    fail("--deviation", f"must be positive, got {config.deviation}")
  if config.nesterov and not config.momentum:
    fail("--nesterov", "must have a --momentum, got 0")
  if args.devices and is_job(args):
    fail("--devices", "must be left out where there are several processes")
  return config


class Dataset(NamedTuple):
  """What is trained and evaluated on.

  Attributes:
    x: training images, shape ``[N, H, W, C]``.
    y: their labels, after the noise, shape ``[N]``, int32.
    x_evaluated: what every epoch ends with, shape ``[M, H, W, C]``.
    y_evaluated: their labels, shape ``[M]``, int32.
    evaluated: ``"test"`` or ``"validation"``.
  """

  x: np.ndarray
  y: np.ndarray
  x_evaluated: np.ndarray
  y_evaluated: np.ndarray
  evaluated: str


def load(
  args: argparse.Namespace, config: Config, parser: argparse.ArgumentParser
) -> tuple[images_lib.Images, Config]:
  """Loads the images, and fills in mean and deviation where they are open.

  Args:
    args: what the parser returned.
    config: of the flags.
    parser: its ``error`` ends the program with status 2.

  Returns:
    The images and the configuration.
  """
  name = paper_recipes.RECIPES[args.recipe].dataset
  if args.data is None:
    archive = cifar.FORMATS[name].archive
    parser.error(
      f"argument --data: must be given: the path of {archive}, which is at "
      "www.cs.toronto.edu/~kriz, or of the folder that it unpacks to"
    )
  is_cifar = False
  try:
    if args.data == "digits":
      images = images_lib.load_digits()
    elif args.data == "mnist":
      images = images_lib.load_mnist()
    elif args.data.endswith(".npz"):
      images = images_lib.load_npz(args.data)
    elif images_lib.is_image_folder(args.data):
      images = images_lib.load_folder(args.data, config.image_size)
    else:
      is_cifar = True
      images = cifar.load(name, args.data)
  except data.DataError as error:
    parser.error(f"argument --data: {error}")
  channels = images.x_train.shape[-1]
  if not is_cifar:
    x = images.x_train
    scale = 255 if x.dtype == np.uint8 else 1
    if args.mean is None:
      mean = x.mean((0, 1, 2), dtype=np.float64) / scale
      config = config._replace(mean=tuple(mean.tolist()))
    if args.deviation is None:
      deviation = x.std((0, 1, 2), dtype=np.float64) / scale
      deviation = np.where(deviation > 0, deviation, 1)
      config = config._replace(deviation=tuple(deviation.tolist()))
  for flag, values in (
    ("--mean", config.mean),
    ("--deviation", config.deviation),
  ):
    assert values is not None
    if len(values) not in (1, channels):
      parser.error(
        f"argument {flag}: must be one number, or one for each of the "
        f"{channels} channels, got {len(values)}"
      )
  if config.validation >= len(images.y_train):
    parser.error(
      f"argument --validation: must be below the {len(images.y_train)} "
      f"training rows, got {config.validation}"
    )
  if config.model == "vgg" and min(images.x_train.shape[1:3]) < 32:
    parser.error(
      "argument --model: vgg must have images of 32 x 32 pixels at least, got "
      f"{images.x_train.shape[1]} x {images.x_train.shape[2]}. Use resnet"
    )
  return images, config


def dataset_of(images: images_lib.Images, config: Config, seed: int) -> Dataset:
  """The rows and labels of a seed."""
  labels = images.y_train
  x_evaluated, y_evaluated = images.x_test, images.y_test
  order = np.arange(len(labels))
  evaluated = "test"
  if config.validation:
    order = np.random.default_rng((seed, 2)).permutation(len(labels))
    held, order = np.split(order, [config.validation])
    order.sort()
    x_evaluated, y_evaluated = images.x_train[held], labels[held]
    evaluated = "validation"
  noisy = label_noise.corrupt(
    labels[order],
    images.classes,
    config.label_noise,
    config.label_noise_kind,
    seed,
    images.noise_targets,
  )
  x = images.x_train if not config.validation else images.x_train[order]
  return Dataset(x, noisy, x_evaluated, y_evaluated, evaluated)


def program_of(
  config: Config,
  image: tuple[int, ...],
  dtype: Any,
  classes: int,
  rows: int,
  mesh: jax.sharding.Mesh,
  parser: argparse.ArgumentParser,
) -> program_lib.Program:
  """The programs for so many training rows, whose batches the devices share."""
  if config.batch_size > rows:
    parser.error(
      f"argument --batch-size: must be at most the {rows} training rows, got "
      f"{config.batch_size}"
    )
  plan = batches_lib.Plan(
    rows, config.batch_size, drop_last=config.drop_last, seed=0
  )
  if config.batch_size % mesh.size:
    parser.error(
      f"argument --batch-size: must split evenly over {mesh.size} devices, got "
      f"{config.batch_size}"
    )
  if plan.last_size % mesh.size:
    parser.error(
      f"argument --drop-last: must be given where the last {plan.last_size} "
      f"rows of an epoch do not split evenly over {mesh.size} devices"
    )
  for size in (config.batch_size, plan.last_size):
    try:
      check_batch(
        np.broadcast_to(0, size or config.batch_size),
        config.microbatches,
        1.0 if config.optimizer == "sgd" else config.ascent_fraction,
      )
    except ValueError as error:
      message = str(error).replace("`num_microbatches`", "--microbatches")
      message = message.replace("`ascent_fraction`", "--ascent-fraction")
      remedy = " --drop-last leaves out the last rows of an epoch."
      parser.error(message + remedy * (size == plan.last_size))
  assert config.mean is not None
  assert config.deviation is not None
  return program_lib.Program(
    config,
    program_lib.Shapes(
      image, dtype, classes, plan.steps_an_epoch, plan.last_size
    ),
    mesh,
    mean=config.mean,
    deviation=config.deviation,
  )


def is_job(args: argparse.Namespace) -> bool:
  """Whether the flags speak of several processes."""
  return args.distributed or any(
    x is not None
    for x in (args.coordinator_address, args.num_processes, args.process_id)
  )


def mesh_of(
  args: argparse.Namespace, parser: argparse.ArgumentParser
) -> jax.sharding.Mesh:
  """The devices of the flags, all of them or the first."""
  if args.devices is None:
    return _parallel.make_mesh()
  devices = jax.devices()
  if args.devices > len(devices):
    parser.error(
      f"argument --devices: must be at most {len(devices)}, got {args.devices}"
    )
  return jax.make_mesh(
    (args.devices,),
    ("batch",),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=devices[: args.devices],
  )

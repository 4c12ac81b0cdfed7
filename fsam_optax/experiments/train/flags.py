"""The flags of ``train``, in the groups that its help shows.

A field is a flag, its line under ``Attributes:`` the flag's help text. A field
that is None by default is what the recipe, the network or the images say.
"""

import dataclasses
import pathlib
from typing import Annotated, Literal, Optional

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import values
from fsam_optax.experiments.data.label_noise import KINDS
from fsam_optax.experiments.train import gate
from fsam_optax.experiments.train.recipes import RECIPES

MASKS = {
  "none": None,
  "exclude_biases_and_norms": fsam_optax.masks.exclude_biases_and_norms,
  "norms_only": fsam_optax.masks.norms_only,
}

_WHOLE = values.integer(1, remedy="write a whole number")
_Number = Annotated[float, values.number(0, remedy="write one such as 0.05")]
_Positive = Annotated[
  float, values.number(0, above=True, remedy="write one such as 0.05")
]
_Fraction = Annotated[float, values.number(0, 1, remedy="write 0.5 for a half")]
_Below1 = Annotated[
  float, values.number(0, 1, below=True, remedy="write one such as 0.4")
]
_Count = Annotated[int, _WHOLE]
_NATURAL = values.integer(0, remedy="write a whole number")
_Natural = Annotated[int, _NATURAL]
_Channels = Annotated[
  Optional[tuple[float, ...]],
  values.numbers("0.5,0.5,0.5", metavar="R,G,B"),
  values.default("CIFAR's, or that of the training images"),
]
_Spreads = Annotated[
  Optional[tuple[float, ...]],
  values.numbers("0.5,0.5,0.5", metavar="R,G,B", above=0),
  values.default("CIFAR's, or that of the training images"),
]
_NetworksOwn = Annotated[Optional[int], _WHOLE, values.default("the network's")]


@dataclasses.dataclass(frozen=True)
class Ascent:
  """The perturbation at which the second gradient is taken.

  Attributes:
    optimizer: who ascends, and along what; sgd does not.
    rho: radius of the perturbation.
    sigma: fraction of the average that F-SAM subtracts from the gradient.
    lmbda: decay of the average.
    adaptive: measure the radius in the metric of ASAM.
    eta: added to the weights in that metric.
    mask: the parameters that are perturbed; none perturbs all.
    order: take the average before (paper) or after (official) it is used.
    accumulator_dtype: of the average.
    ema_gradient: which gradient the average takes in, the first or the second.
    ascent_fraction: of the rows that the ascent takes.
    sync_perturbation: ascend along the gradient of all devices, and not each
      along its own, which needs --sharding shard_map.
    every: ascend at one step in so many.
    start: first step that ascends, or the first epoch as in 10epochs. Batches
      are counted, from 0, those that were skipped among them.
    stop: first step, or epoch as in 150epochs, that ascends no more.
  """

  optimizer: Annotated[str, values.choice(optimizers.NAMES)] = "fsam"
  rho: _Number = 0.2
  sigma: _Number = 1.0
  lmbda: _Fraction = 0.95
  adaptive: bool = False
  eta: _Number = 0.0
  mask: Annotated[str, values.choice(MASKS)] = "none"
  order: Literal["official", "paper"] = "official"
  accumulator_dtype: Annotated[
    Optional[str],
    values.choice(("float32", "bfloat16", "float16", "float64")),
    values.default("that of the parameters"),
  ] = None
  ema_gradient: Literal["ascent", "descent"] = "ascent"
  ascent_fraction: Annotated[
    float, values.number(0, 1, above=True, remedy="write 0.5 for a half")
  ] = 1.0
  sync_perturbation: bool = True
  every: _Count = 1
  start: Annotated[str, values.value("STEPS", gate.parse)] = "0"
  stop: Annotated[
    Optional[str], values.value("STEPS", gate.parse), values.default("never")
  ] = None


@dataclasses.dataclass(frozen=True)
class Descent:
  """SGD with the second gradient, and the batches that it goes through.

  Attributes:
    learning_rate: at the first step; a cosine takes it to 0.
    momentum: of SGD.
    nesterov: take Nesterov's momentum.
    weight_decay: coupled, of all parameters.
    label_smoothing: of the loss that is trained on.
    epochs: passes over the training rows.
    batch_size: rows a step, of all devices together.
    drop_last: leave rows that fill no whole batch for another epoch.
    num_microbatches: parts of a batch that go through one at a time, in less
      memory.
    skip_nonfinite: leave the parameters as they were at a step whose loss or
      gradient is not finite.
    sharding: replicated keeps the parameters whole on every device, fsdp in
      parts; shard_map runs the step on each device by itself, where BatchNorm
      sees the rows of that one alone.
  """

  learning_rate: _Positive = 0.05
  momentum: _Below1 = 0.9
  nesterov: bool = False
  weight_decay: _Number = 1e-3
  label_smoothing: _Below1 = 0.0
  epochs: _Count = 200
  batch_size: _Count = 128
  drop_last: bool = False
  num_microbatches: _Count = 1
  skip_nonfinite: bool = True
  sharding: Literal["replicated", "fsdp", "shard_map"] = "replicated"


@dataclasses.dataclass(frozen=True)
class Network:
  """The network.

  Attributes:
    model: its kind.
    depth: layers.
    width: channels of the first stage; of wide_resnet, the widening factor.
    dropout: of vgg, before its linear layers.
    dtype: of the computation; the parameters are float32, or float64 with it.
  """

  model: Annotated[
    Optional[str],
    values.choice(networks.REGISTRY),
    values.default("the recipe's"),
  ] = None
  depth: _NetworksOwn = None
  width: _NetworksOwn = None
  dropout: _Below1 = 0.5
  dtype: Literal["float32", "bfloat16", "float64"] = "float32"


@dataclasses.dataclass(frozen=True)
class Images:
  """The images, their augmentation and their labels.

  Attributes:
    flip: mirror half of the images.
    crop_padding: width of the black frame, in pixels, that crops are taken in.
    cutout: side of the square that is erased, in pixels; 0 is off.
    cutout_probability: fraction of the images that it is erased in.
    mean: of each channel in [0, 1].
    standard_deviation: of each channel in [0, 1].
    image_size: side to scale the images to, in pixels.
    label_noise: fraction of the training labels that are replaced.
    label_noise_kind: each by another class (symmetric), by any class (uniform),
      or by one that is easily taken for it (asymmetric).
    validation: training rows to evaluate on in the place of the test rows,
      which nothing may be chosen by.
  """

  flip: bool = True
  crop_padding: _Natural = 4
  cutout: _Natural = 16
  cutout_probability: _Fraction = 0.5
  mean: _Channels = None
  standard_deviation: _Spreads = None
  image_size: Annotated[Optional[int], _WHOLE, values.default("their own")] = (
    None
  )
  label_noise: _Fraction = 0.0
  label_noise_kind: Annotated[
    Optional[str],
    values.choice(KINDS),
    values.default("uniform of CIFAR, else symmetric"),
  ] = None
  validation: _Natural = 0


@dataclasses.dataclass(frozen=True)
class Run:
  """What is run, written and shown; no number of a seed depends on it.

  Attributes:
    seeds: how many to train, one after the other.
    first_seed: the least of them.
    save_every: write a checkpoint so often, besides at the end of each epoch.
    log_every: write the metrics of a step so often.
    evaluation_batch_size: rows that are evaluated at a time.
    tensorboard: write the metrics for TensorBoard, too.
  """

  seeds: Annotated[int, _WHOLE] = 1
  first_seed: _Natural = 1
  save_every: Annotated[
    Optional[int],
    values.integer(1, remedy="write a number of steps", metavar="STEPS"),
    values.default("never"),
  ] = None
  log_every: Annotated[
    int, values.integer(1, remedy="write a number of steps", metavar="STEPS")
  ] = 50
  evaluation_batch_size: Annotated[int, _WHOLE] = 1000
  tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Processes:
  """The devices, and the processes of a job.

  Attributes:
    devices: use so many of this process.
    cpu_devices: split the CPU into so many devices.
    launch: start so many processes here, and end all when one fails.
    distributed: join a job as on a TPU pod.
    coordinator_address: of process 0.
    num_processes: of the job.
    process_id: which of them this is, from 0.
    timeout: how long to wait for the other processes at the start.
  """

  devices: Annotated[Optional[int], _WHOLE, values.default("all")] = None
  cpu_devices: Annotated[Optional[int], _WHOLE, values.default("")] = None
  launch: Annotated[Optional[int], _WHOLE, values.default("")] = None
  distributed: bool = False
  coordinator_address: Annotated[
    Optional[str], values.value("HOST:PORT", str), values.default("")
  ] = None
  num_processes: Annotated[Optional[int], _WHOLE, values.default("")] = None
  process_id: Annotated[Optional[int], _NATURAL, values.default("")] = None
  timeout: Annotated[
    int, values.integer(1, remedy="write whole seconds", metavar="SECONDS")
  ] = 300

  @property
  def is_job(self) -> bool:
    """Whether the flags speak of several processes."""
    return self.distributed or any(
      x is not None
      for x in (self.coordinator_address, self.num_processes, self.process_id)
    )


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that the command line says.

  Attributes:
    recipe: a data set and a network of the paper.
    data: the binary version of the recipe's CIFAR, its .tar.gz or its folder;
      or a folder of images with train/CLASS/ and test/CLASS/; or an .npz with
      x_train, y_train, x_test and y_test, whose labels may be numbers, words or
      one-hot rows; or mnist or digits, the small sets in packages.
    output: folder of the run, from whose last checkpoint it goes on.
    dry_run: print the plan, the parameters, the memory and the cost, and end.
  """

  recipe: Annotated[str, values.choice(RECIPES)] = "cifar100-resnet18"
  data: Annotated[
    Optional[str], values.value("PATH", str), values.default("")
  ] = None
  output: Annotated[
    Optional[pathlib.Path],
    values.value("DIR", pathlib.Path),
    values.default("runs/RECIPE-OPTIMIZER"),
  ] = None
  dry_run: bool = False
  ascent: Ascent = dataclasses.field(default_factory=Ascent)
  descent: Descent = dataclasses.field(default_factory=Descent)
  network: Network = dataclasses.field(default_factory=Network)
  images: Images = dataclasses.field(default_factory=Images)
  run: Run = dataclasses.field(default_factory=Run)
  processes: Processes = dataclasses.field(default_factory=Processes)

  @property
  def folder(self) -> pathlib.Path:
    """The folder of the run."""
    default = pathlib.Path("runs") / f"{self.recipe}-{self.ascent.optimizer}"
    return self.output or default

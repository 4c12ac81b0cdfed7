"""The flags of ``train``, in the groups that its help shows.

A field is a flag, its line under ``Attributes:`` the flag's help text. A field
that is empty or 0 by default is what the recipe, the network or the images say.
"""

import dataclasses
import pathlib
import re
from typing import Annotated, Any, Literal, NamedTuple, Optional

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import values
from fsam_optax.experiments.data.label_noise import KINDS


class Recipe(NamedTuple):
  """A data set and a network of the paper, by their names in the registries."""

  dataset: str
  model: str


# The authors publish a script for the first alone, in which they name the other
# two networks (https://github.com/nblt/F-SAM, run.sh and train.py). Its numbers
# are those of all four: the defaults of the flags.
RECIPES = {
  "cifar100-resnet18": Recipe("cifar100", "resnet"),
  "cifar10-resnet18": Recipe("cifar10", "resnet"),
  "cifar100-vgg16bn": Recipe("cifar100", "vgg"),
  "cifar100-wrn28x10": Recipe("cifar100", "wide_resnet"),
}
MASKS = {
  "none": None,
  "exclude_biases_and_norms": fsam_optax.masks.exclude_biases_and_norms,
  "norms_only": fsam_optax.masks.norms_only,
}

_WHOLE, _NATURAL = values.integer(1), values.integer(0)
_NONE = values.default("")
_Number = Annotated[float, values.number(0)]
_Fraction = Annotated[float, values.number(0, 1)]
_BelowOne = Annotated[float, values.number(0, 1, below=True)]
_Count = Annotated[int, _WHOLE]
_Natural = Annotated[int, _NATURAL]
_NetworksOwn = Annotated[int, _WHOLE, values.default("the network's")]
_Moments = Annotated[
  tuple[float, ...],
  values.default("CIFAR's, or that of the training images"),
]


def steps_of(text: str, steps_an_epoch: int) -> int:
  """The number of steps that a flag such as ``--start`` says.

  Examples:
    >>> steps_of("3000", 390), steps_of("10epochs", 390)
    (3000, 3900)
  """
  match = re.fullmatch(r"(\d{1,9})(epochs?)?", text)
  if match is None:
    raise ValueError(
      "must be a number of steps such as 3000, or of epochs such as 10epochs, "
      f"got {text!r}"
    )
  return int(match[1]) * (steps_an_epoch if match[2] else 1)


def _steps(text: str) -> str:
  steps_of(text, 1)  # Raises where it is none.
  return text


def _address(text: str) -> str:
  _, _, port = text.rpartition(":")
  if not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ValueError(
      f"must be a host and a port such as 10.0.0.1:8476, got {text!r}"
    )
  return text


_STEPS = values.value("STEPS", _steps)


def by_flag(*groups: Any) -> dict[str, Any]:
  """The fields of dataclasses, as ``{"--rho": 0.2, ...}``."""
  return {
    f"--{field.name.replace('_', '-')}": getattr(group, field.name)
    for group in groups
    for field in dataclasses.fields(group)
  }


@dataclasses.dataclass(frozen=True)
class Ascent:
  """The perturbation at which the second gradient is taken.

  Attributes:
    optimizer: sgd does not ascend.
    rho: radius of the perturbation.
    sigma: fraction of the average that F-SAM subtracts from the gradient.
    lmbda: decay of the average.
    adaptive: measure the radius in the metric of ASAM.
    mask: the parameters that are perturbed; none perturbs all.
    average: own, or the optimizer's momentum, which takes no memory; lmbda is
      then the momentum.
    ema_gradient: which gradient the average takes in, the first or the second.
    ascent_fraction: of the rows that the ascent takes.
    sync_perturbation: ascend along the gradient of all devices and parts of the
      batch. With --no-sync-perturbation each ascends along its own, and
      BatchNorm sees the rows of one device alone.
    every: ascend at one step in so many.
    start: first step that ascends, from 0, or the first epoch as in 10epochs. A
      step that was skipped does not count.
    stop: first step, or epoch as in 150epochs, that ascends no more.
  """

  optimizer: Annotated[str, values.choice(optimizers.NAMES)] = "fsam"
  rho: _Number = 0.2
  sigma: _Number = 1.0
  lmbda: _Fraction = 0.95
  adaptive: bool = False
  mask: Annotated[str, values.choice(MASKS)] = "none"
  average: Literal["own", "optimizer"] = "own"
  ema_gradient: Literal["ascent", "descent"] = "ascent"
  ascent_fraction: Annotated[float, values.number(0, 1, above=True)] = 1.0
  sync_perturbation: bool = True
  every: _Count = 1
  start: Annotated[str, _STEPS] = "0"
  stop: Annotated[Optional[str], _STEPS, values.default("never")] = None


@dataclasses.dataclass(frozen=True)
class Descent:
  """SGD with the second gradient, and the batches that it goes through.

  Attributes:
    learning_rate: at the first step; a cosine takes it to 0.
    momentum: of SGD.
    weight_decay: coupled, of all parameters.
    epochs: passes over the training rows.
    batch_size: rows a step, of all devices together; rows that fill no whole
      batch are left out of an epoch.
    num_microbatches: parts of a batch that are computed one after the other, in
      less memory.
    skip_nonfinite: leave the parameters as they were at a step whose loss or
      gradient is not finite.
    sharding: keep the parameters whole on every device (replicated), or in
      parts (fsdp).
  """

  learning_rate: Annotated[float, values.number(0, above=True)] = 0.05
  momentum: _BelowOne = 0.9
  weight_decay: _Number = 1e-3
  epochs: _Count = 200
  batch_size: _Count = 128
  num_microbatches: _Count = 1
  skip_nonfinite: bool = True
  sharding: Literal["replicated", "fsdp"] = "replicated"


@dataclasses.dataclass(frozen=True)
class Network:
  """The network.

  Attributes:
    model: its kind.
    depth: layers.
    width: channels of the first stage; of wide_resnet, the widening factor.
    dtype: of the computation; the parameters are float32, or float64 with it.
  """

  model: Annotated[
    str, values.choice(networks.REGISTRY), values.default("the recipe's")
  ] = ""
  depth: _NetworksOwn = 0
  width: _NetworksOwn = 0
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
    image_size: side to scale the images to, in pixels, if any.
    label_noise: fraction of the training labels that are replaced.
    label_noise_kind: each by another class (symmetric), by any class as in the
      authors' script (uniform), or by one that is easily taken for it
      (asymmetric).
    validation: training rows to evaluate on in place of the test rows, by which
      nothing may be chosen.
  """

  flip: bool = True
  crop_padding: Annotated[
    Optional[int], _NATURAL, values.default("an eighth of the side")
  ] = None
  cutout: Annotated[
    Optional[int], _NATURAL, values.default("half of the side")
  ] = None
  cutout_probability: _Fraction = 0.5
  mean: _Moments = ()
  standard_deviation: _Moments = ()
  image_size: Annotated[Optional[int], _WHOLE, _NONE] = None
  label_noise: _Fraction = 0.0
  label_noise_kind: Annotated[str, values.choice(KINDS)] = "symmetric"
  validation: _Natural = 0


@dataclasses.dataclass(frozen=True)
class Run:
  """What is run, written and shown; no number of a seed depends on it.

  Attributes:
    seeds: how many to train, one after the other.
    first_seed: the least of them.
    save_every: write a checkpoint after so many steps, besides at the end of
      each epoch.
    log_every: write the metrics of a step after so many.
    evaluation_batch_size: rows that are evaluated at a time.
    tensorboard: write the metrics for TensorBoard, too.
  """

  seeds: _Count = 1
  first_seed: _Natural = 1
  save_every: Annotated[Optional[int], _WHOLE, values.default("never")] = None
  log_every: _Count = 50
  evaluation_batch_size: _Count = 1000
  tensorboard: bool = False


@dataclasses.dataclass(frozen=True)
class Processes:
  """The devices, and the processes of a job.

  Attributes:
    cpu_devices: split the CPU into so many devices.
    distributed: join a job as on a TPU pod.
    coordinator_address: of process 0.
    num_processes: of the job.
    process_id: which of them this is, from 0.
    timeout: seconds to wait for the other processes at the start.
  """

  cpu_devices: Annotated[Optional[int], _WHOLE, _NONE] = None
  distributed: bool = False
  coordinator_address: Annotated[
    Optional[str], values.value("HOST:PORT", _address), _NONE
  ] = None
  num_processes: Annotated[Optional[int], _WHOLE, _NONE] = None
  process_id: Annotated[Optional[int], _NATURAL, _NONE] = None
  timeout: _Count = 300


@dataclasses.dataclass(frozen=True)
class Settings:
  """Everything that the command line says.

  Attributes:
    recipe: a data set and a network of the paper.
    data: the binary version of the recipe's CIFAR, its .tar.gz or its folder;
      or a folder of images with train/CLASS/ and test/CLASS/; or an .npz with
      x_train, y_train, x_test and y_test; or mnist or digits, the small sets in
      packages.
    output: folder of the run, from whose last checkpoint it goes on.
    dry_run: print the plan, the parameters, the memory and the cost, and end.
  """

  recipe: Annotated[str, values.choice(RECIPES)] = "cifar100-resnet18"
  data: Annotated[Optional[str], values.value("PATH", str), _NONE] = None
  output: Annotated[
    Optional[pathlib.Path],
    values.value("DIR", pathlib.Path),
    values.default("runs/NAME-OPTIMIZER"),
  ] = None
  dry_run: bool = False
  ascent: Ascent = dataclasses.field(default_factory=Ascent)
  descent: Descent = dataclasses.field(default_factory=Descent)
  network: Network = dataclasses.field(default_factory=Network)
  images: Images = dataclasses.field(default_factory=Images)
  run: Run = dataclasses.field(default_factory=Run)
  processes: Processes = dataclasses.field(default_factory=Processes)

  def by_flag(self) -> dict[str, Any]:
    """What the numbers of a run depend on, but its data and seed."""
    return by_flag(self.ascent, self.descent, self.network, self.images)

  def name_on(self, images: str) -> str:
    """What complete settings train: the recipe, or images and network."""
    is_recipes = (images, self.network.model) == RECIPES[self.recipe]
    return self.recipe if is_recipes else f"{images}, {self.network.model}"

  def folder_of(self, name: str) -> pathlib.Path:
    """The folder of a run of this name."""
    name = re.sub(r"\W+", "-", f"{name}-{self.ascent.optimizer}")
    return self.output or pathlib.Path("runs") / name.strip("-")

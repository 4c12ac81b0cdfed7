"""What the command line of ``train`` says, and what must hold between flags."""

import dataclasses
import pathlib
from typing import Annotated, Optional

from fsam_optax.experiments import networks
from fsam_optax.experiments.common import values
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train.config import WHOLE
from fsam_optax.experiments.train.config import Ascent
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.config import Descent
from fsam_optax.experiments.train.config import Images
from fsam_optax.experiments.train.config import Network
from fsam_optax.experiments.train.recipes import RECIPES

_NATURAL = values.integer(0, remedy="write a whole number")


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

  seeds: Annotated[int, WHOLE] = 1
  first_seed: Annotated[int, _NATURAL] = 1
  save_every: Annotated[
    Optional[int],
    values.integer(1, remedy="write a number of steps", metavar="STEPS"),
    values.default("never"),
  ] = None
  log_every: Annotated[
    int, values.integer(1, remedy="write a number of steps", metavar="STEPS")
  ] = 50
  evaluation_batch_size: Annotated[int, WHOLE] = 1000
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

  devices: Annotated[Optional[int], WHOLE, values.default("all")] = None
  cpu_devices: Annotated[Optional[int], WHOLE, values.default("")] = None
  launch: Annotated[Optional[int], WHOLE, values.default("")] = None
  distributed: bool = False
  coordinator_address: Annotated[
    Optional[str], values.value("HOST:PORT", str), values.default("")
  ] = None
  num_processes: Annotated[Optional[int], WHOLE, values.default("")] = None
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
      x_train, y_train, x_test and y_test; or mnist or digits, the small sets
      in packages.
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


def config_of(settings: Settings) -> Config:
  """The configuration of the flags, with what the recipe says of the network.

  Args:
    settings: what the command line says.

  Returns:
    The configuration. What depends on the images is still open.

  Raises:
    FlagError: if what must hold between two flags does not.
  """
  network = settings.network
  model = network.model or RECIPES[settings.recipe].model
  entry = networks.REGISTRY[model]
  network = dataclasses.replace(
    network,
    model=model,
    depth=network.depth or entry.depth,
    width=network.width or entry.width,
  )
  config = Config(settings.ascent, settings.descent, network, settings.images)
  _check_config(config)
  _check_processes(settings.processes)
  return config


def _check_config(config: Config) -> None:
  ascent, descent, network = config.ascent, config.descent, config.network
  assert network.model is not None
  assert network.depth is not None
  if must := networks.REGISTRY[network.model].check_depth(network.depth):
    raise FlagError("--depth", f"must be {must}, got {network.depth}")
  if descent.nesterov and not descent.momentum:
    raise FlagError("--nesterov", "must have a --momentum, got 0")
  is_local = not ascent.sync_perturbation
  if (
    is_local
    and descent.sharding != "shard_map"
    and descent.num_microbatches == 1
  ):
    # The compiler sums a gradient over all devices before anybody sees it.
    raise FlagError(
      "--no-sync-perturbation",
      "must have --sharding shard_map, where a device has a gradient of its "
      f"own, or --num-microbatches above 1, got --sharding {descent.sharding}",
    )
  if ascent.accumulator_dtype == "float64" and network.dtype != "float64":
    raise FlagError(
      "--accumulator-dtype",
      f"must have --dtype float64 to be float64, got --dtype {network.dtype}",
    )


def _check_processes(processes: Processes) -> None:
  job = {
    "--coordinator-address": processes.coordinator_address,
    "--num-processes": processes.num_processes,
    "--process-id": processes.process_id,
  }
  given = [flag for flag, value in job.items() if value is not None]
  missing = [flag for flag in job if flag not in given]
  if given and missing:
    raise FlagError(
      given[0],
      f"must come with {' and '.join(missing)}, got none. A TPU pod needs "
      "--distributed alone",
    )
  if given:
    _, _, port = str(processes.coordinator_address).rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
      raise FlagError(
        "--coordinator-address",
        "must be a host and a port such as 10.0.0.1:8476, got "
        f"{processes.coordinator_address!r}",
      )
    assert processes.num_processes is not None
    assert processes.process_id is not None
    if processes.process_id >= processes.num_processes:
      raise FlagError(
        "--process-id",
        f"must be below --num-processes, {processes.num_processes}, got "
        f"{processes.process_id}. Count from 0",
      )
  if processes.launch is not None and processes.is_job:
    raise FlagError(
      "--launch", "must be left out where a process joins a job by itself"
    )
  if processes.devices and (processes.is_job or processes.launch):
    raise FlagError(
      "--devices", "must be left out where there are several processes"
    )

"""The configuration of a run: all that its numbers depend on, but for the data.

It follows from the flags, and what must hold between two of them is said here.
"""

import dataclasses
from typing import Any

from fsam_optax.experiments import networks
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import flags
from fsam_optax.experiments.train.recipes import RECIPES


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that the numbers of a run depend on, but its data and seed.

  The defaults are the authors' script for ResNet-18 on CIFAR-100.
  """

  ascent: flags.Ascent = dataclasses.field(default_factory=flags.Ascent)
  descent: flags.Descent = dataclasses.field(default_factory=flags.Descent)
  network: flags.Network = dataclasses.field(default_factory=flags.Network)
  images: flags.Images = dataclasses.field(default_factory=flags.Images)

  def by_flag(self) -> dict[str, Any]:
    """All values, as ``{"--rho": 0.2, ...}``."""
    groups = (self.ascent, self.descent, self.network, self.images)
    return {
      f"--{field.name.replace('_', '-')}": getattr(group, field.name)
      for group in groups
      for field in dataclasses.fields(group)
    }


def config_of(settings: flags.Settings) -> Config:
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
  _check_between_flags(config)
  _check_processes(settings.processes)
  return config


def _check_between_flags(config: Config) -> None:
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


def _check_processes(processes: flags.Processes) -> None:
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

"""``train``: a network on CIFAR or other images, as the authors train it."""

import contextlib
import dataclasses
import shutil
import sys
import traceback
from typing import Any

import jax

from fsam_optax.experiments import data
from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import terminal
from fsam_optax.experiments.common.flags import Command
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import launch
from fsam_optax.experiments.train import plan
from fsam_optax.experiments.train import processes
from fsam_optax.experiments.train import rows
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.config import config_of
from fsam_optax.experiments.train.flags import Settings
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.recipes import RECIPES


def run(settings: Settings) -> None:
  """Trains, or prints what would be trained.

  Args:
    settings: what the command line says.

  Raises:
    FlagError: if a flag asks for what cannot be.
    SystemExit: where something else than a flag is in the way, or the run was
      told to end.
  """
  extras.require("grain", "orbax.checkpoint", "matplotlib")
  if settings.run.tensorboard:
    extras.require("tensorboardX")
  config = config_of(settings)
  if settings.processes.launch is not None:
    with terminal.outliving_streams():
      sys.exit(launch.launch(settings.processes.launch, _arguments()))
  if settings.processes.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.processes.cpu_devices)
  if config.network.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  if settings.dry_run:
    _print_plan(settings, config)
    return
  images, config = rows.load(settings.data, RECIPES[settings.recipe], config)
  with terminal.outliving_streams():
    _run_or_end(settings, config, images)


COMMAND = Command(
  name="train",
  help="train a network on CIFAR as the paper does, or on your own images",
  settings=Settings,
  run=run,
)


def _arguments() -> list[str]:
  """Those of this process, but for ``--launch``."""
  arguments = ["-m", "fsam_optax", *sys.argv[1:]]
  for i, argument in enumerate(arguments):
    if argument == "--launch":
      return arguments[:i] + arguments[i + 2 :]
    if argument.startswith("--launch="):
      return arguments[:i] + arguments[i + 1 :]
  return arguments


def _print_plan(settings: Settings, config: Config) -> None:
  images = None
  if settings.data is not None:
    images, config = rows.load(settings.data, RECIPES[settings.recipe], config)
  sizes = plan.sizes_of(settings.recipe, config, images)
  mesh = processes.mesh_of(settings.processes)
  print(plan.text(settings, plan.program_of(config, sizes, mesh), sizes))


def _run_or_end(
  settings: Settings, config: Config, images: data.Images
) -> None:
  """Joins the job, trains, and ends with the status that fits."""
  from fsam_optax.experiments.train import folder
  from fsam_optax.experiments.train import interruption
  from fsam_optax.experiments.train import loop

  try:
    with contextlib.ExitStack() as stack:

      def hold():
        if message := files.make_directory(settings.folder):
          raise FlagError("--output", message)
        stack.enter_context(folder.lock(settings.folder))

      job = settings.processes
      # Before the others come, who need not wait where it is held already. On a
      # pod nobody knows yet which process is the first.
      if not job.distributed and not job.process_id:
        hold()
      processes.join(job)
      if job.distributed and jax.process_index() == 0:
        hold()
      _train(settings, config, images)
  except (folder.FolderError, loop.DivergedError, processes.JoinError) as error:
    processes.end(f"{COMMAND.program}: error: {error}", 1)
  except interruption.Interrupted as interrupted:
    processes.end(str(interrupted), interrupted.status)
  except BaseException:
    if jax.process_count() == 1:
      raise
    traceback.print_exc()
    processes.end("", 1)


def _train(settings: Settings, config: Config, images: data.Images) -> None:
  """Trains every seed, or what is left of it, and reports."""
  from fsam_optax.experiments.train import folder
  from fsam_optax.experiments.train import interruption
  from fsam_optax.experiments.train import loop
  from fsam_optax.experiments.train import report

  mesh = processes.mesh_of(settings.processes)
  sizes = plan.sizes_of(settings.recipe, config, images)
  program = plan.program_of(config, sizes, mesh)
  is_first = jax.process_index() == 0
  described = plan.described(settings.recipe, config, images.fingerprint())
  processes.check_alike({**described, **_together(settings)})
  processes.check_shared(settings.folder)
  if is_first:
    _check_disk(settings, program)
    folder.check_config(settings.folder, described)
  seeds = range(
    settings.run.first_seed, settings.run.first_seed + settings.run.seeds
  )
  results = {}
  with interruption.Interruption() as interrupted:
    runner = loop.Runner(program, interrupted, settings.run)
    for seed in seeds:
      results[seed] = runner(
        rows.dataset_of(images, config, seed),
        seed,
        settings.folder / f"seed-{seed}",
      )
  if not is_first:
    return
  summary = report.summary(settings.recipe, config, results)
  # Before anything is written, which may fail: the run is not lost by that.
  print(report.table(summary), flush=True)
  with folder.writing(settings.folder / "summary.json"):
    report.write(summary, results, settings.folder)
  print(f"\nwrote {settings.folder / 'summary.json'} and curves.png")


def _together(settings: Settings) -> dict[str, Any]:
  """What the processes of a job do at one time, by flag."""
  return {
    f"--{field.name.replace('_', '-')}": getattr(settings.run, field.name)
    for field in dataclasses.fields(settings.run)
  }


def _check_disk(settings: Settings, program: Program) -> None:
  """Refuses to begin where not even two checkpoints would fit."""
  # One is written before an older one is deleted.
  needed = 2 * plan.bytes_of(program.abstract())
  free = shutil.disk_usage(settings.folder).free
  if free < needed:
    raise FlagError(
      "--output",
      f"must have room for two checkpoints, {needed / 2**20:,.1f} MiB, got "
      f"{str(settings.folder)!r} with {free / 2**20:,.1f} MiB. Make room or "
      "choose another folder",
    )

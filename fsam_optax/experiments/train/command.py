"""``train``: a network on CIFAR or other images, as the authors train it."""

import argparse
import contextlib
import math
import os
import pathlib
import shutil
import sys
import time
import traceback
from typing import Any, NoReturn

import jax
import numpy as np

from fsam_optax import _processes
from fsam_optax.experiments import extras
from fsam_optax.experiments import images as images_lib
from fsam_optax.experiments import paper_recipes
from fsam_optax.experiments import program as program_lib
from fsam_optax.experiments import settings
from fsam_optax.experiments import train_report
from fsam_optax.experiments import train_settings
from fsam_optax.experiments.paper_recipes import Config

NAME = "train"
HELP = "train a network on CIFAR as the paper does, or on your own images"


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the command."""
  train_settings.add_flags(parser)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Runs the command.

  Args:
    args: what the parser returned.
    parser: its ``error`` ends the program with status 2.
  """
  extras.require("grain", "orbax.checkpoint", "matplotlib")
  if args.tensorboard:
    extras.require("tensorboardX")
  config = train_settings.config_of(args, parser)
  if args.output is None:
    args.output = pathlib.Path("runs") / f"{args.recipe}-{config.optimizer}"
  if config.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  if args.dry_run:
    print(_plan(args, config, parser))
    return
  images, config = train_settings.load(args, config, parser)
  from fsam_optax.experiments import run_folder
  from fsam_optax.experiments import training_run

  try:
    with contextlib.ExitStack() as stack:

      def hold():
        settings.check_output(args, parser)
        stack.enter_context(run_folder.lock(args.output))

      if not args.distributed and not args.process_id:
        hold()  # Before the others come: they hear of its end.
      if train_settings.is_job(args):
        _processes.initialize_processes(
          args.coordinator_address, args.num_processes, args.process_id
        )
      if args.distributed and jax.process_index() == 0:
        hold()
      _train(args, config, images, parser)
  except (run_folder.FolderError, training_run.DivergedError) as error:
    _end(f"{parser.prog}: error: {error}", 1)
  except training_run.Interrupted as interruption:
    _end(str(interruption), interruption.status)
  except BaseException:
    if jax.process_count() == 1:
      raise
    # Not by the normal exit, where JAX waits for the process that died.
    traceback.print_exc()
    _end("", 1)


def _described(
  args: argparse.Namespace, config: Config, fingerprint: str
) -> dict[str, Any]:
  """All that the numbers depend on, by flag."""
  fields = {
    f"--{name.replace('_', '-')}": value
    for name, value in config._asdict().items()
  }
  return {"--recipe": args.recipe, **fields, "--data (SHA-256)": fingerprint}


def _end(message: str, status: int) -> NoReturn:
  """Ends the process, without a wait for other ones."""
  if message:
    print(message, file=sys.stderr)
  if jax.process_count() == 1:
    sys.exit(status)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def _train(
  args: argparse.Namespace,
  config: Config,
  images: images_lib.Images,
  parser: argparse.ArgumentParser,
) -> None:
  """Trains every seed, or what is left of it, and reports."""
  from fsam_optax.experiments import run_folder
  from fsam_optax.experiments import training_run

  mesh = train_settings.mesh_of(args, parser)
  rows = len(images.y_train) - config.validation
  image, dtype = images.x_train.shape[1:], images.x_train.dtype
  program = train_settings.program_of(
    config, image, dtype, images.classes, rows, mesh, parser
  )
  is_first = jax.process_index() == 0
  if is_first:
    _check_disk(args, program, parser)
    run_folder.check_config(
      args.output, _described(args, config, images.fingerprint())
    )
  seeds = range(args.first_seed, args.first_seed + args.seeds)
  results = {}
  with training_run.Interruption() as interruption:
    runner = training_run.Runner(
      program,
      interruption,
      save_every=args.save_every,
      log_every=args.log_every,
      evaluation_rows=args.evaluation_batch_size,
      tensorboard=args.tensorboard,
    )
    for seed in seeds:
      dataset = train_settings.dataset_of(images, config, seed)
      folder = args.output / f"seed-{seed}"
      results[seed] = runner(dataset, seed, folder)
  if not is_first:
    return
  summary = train_report.summary(args.recipe, config, results)
  with run_folder.writing(args.output / "summary.json"):
    train_report.write(summary, results, args.output)
  print(train_report.table(summary))
  print(f"\nwrote {args.output / 'summary.json'} and curves.png")


def _check_disk(
  args: argparse.Namespace,
  program: program_lib.Program,
  parser: argparse.ArgumentParser,
) -> None:
  """Refuses to begin where not even two checkpoints would fit."""
  needed = 2 * _bytes(program.abstract())
  free = shutil.disk_usage(args.output).free
  if free < needed:
    parser.error(
      f"argument --output: must have room for two checkpoints, "
      f"{needed / 2**20:,.1f} MiB, got {str(args.output)!r} with "
      f"{free / 2**20:,.1f} MiB. Make room or choose another folder"
    )


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def _plan(
  args: argparse.Namespace, config: Config, parser: argparse.ArgumentParser
) -> str:
  """What would be run, with XLA's count of its memory and cost."""
  mesh = train_settings.mesh_of(args, parser)
  if args.data is None:
    dataset = paper_recipes.RECIPES[args.recipe].dataset
    rows, tests, image = 50_000, 10_000, (32, 32, 3)
    classes, dtype = int(dataset.removeprefix("cifar")), np.dtype(np.uint8)
    origin = f"{dataset}, not read"
  else:
    images, config = train_settings.load(args, config, parser)
    rows, tests = len(images.y_train), len(images.y_test)
    image, dtype = images.x_train.shape[1:], images.x_train.dtype
    classes, origin = images.classes, images.name
  program = train_settings.program_of(
    config, image, dtype, classes, rows - config.validation, mesh, parser
  )
  abstract = program.abstract()
  start = time.perf_counter()
  compiled = program.lower_step(config.batch_size).compile()
  seconds = time.perf_counter() - start
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  parameters = sum(
    math.prod(x.shape) for x in jax.tree.leaves(abstract.state.params)
  )
  mebi = lambda number: f"{number / 2**20:,.1f} MiB"
  steps = program.shapes.steps_an_epoch
  flops = cost["flops"]
  gradients = "1 gradient"
  if config.optimizer != "sgd":
    gradients = f"{1 + config.ascent_fraction:g} gradients"
  lines = {
    "recipe": f"{args.recipe}, {config.optimizer}",
    "images": f"{origin}: {rows - config.validation:,} to train on, "
    f"{config.validation or tests:,} to evaluate on, of "
    f"{' x '.join(map(str, image))}, {classes} classes",
    "network": f"{config.model}, depth {config.depth}, width {config.width}: "
    f"{parameters:,} parameters, {config.dtype}",
    "steps": f"{steps:,} an epoch, {program.steps:,} in {config.epochs} "
    f"epochs, {config.batch_size} rows and {gradients} a step",
    "learning rate": f"{config.learning_rate:g}, by a cosine to 0",
    "devices": f"{mesh.size} of {mesh.devices.flat[0].device_kind}",
    "checkpoint": f"{mebi(_bytes(abstract))}, of which three are kept, in "
    f"{args.output}",
    "memory": f"{mebi(memory.temp_size_in_bytes)} beside the state of "
    f"{mebi(_bytes(abstract))}, a device",
    "cost": f"{flops / 1e9:,.2f} GFLOP a step and device, "
    f"{flops * program.steps * mesh.size / 1e15:,.3g} PFLOP in all"
    + (
      f"; a loop's body is counted once, of {config.microbatches}"
      if config.microbatches > 1
      else ""
    ),
    "seeds": f"{args.first_seed} to {args.first_seed + args.seeds - 1}",
    "compiled in": f"{seconds:.0f} s",
  }
  fields = _described(args, config, "not computed")
  flags = " ".join(
    f"{name} {value}" for name, value in fields.items() if name != "--recipe"
  )
  width = max(map(len, lines))
  table = "\n".join(f"{k:{width}}  {v}" for k, v in lines.items())
  return f"{table}\n\n{flags}\n\nNothing was trained or written."


__all__ = ["HELP", "NAME", "add_flags", "run"]

"""``train``: a network on CIFAR or other images, as the authors train it."""

import contextlib
import hashlib
import pathlib
import traceback

import jax
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.flags import Command
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.train import folder
from fsam_optax.experiments.train import job
from fsam_optax.experiments.train import preview
from fsam_optax.experiments.train import rows
from fsam_optax.experiments.train import signals
from fsam_optax.experiments.train.config import Config
from fsam_optax.experiments.train.program import Program
from fsam_optax.experiments.train.settings import GROUPS
from fsam_optax.experiments.train.settings import Settings
from fsam_optax.experiments.train.settings import by_flag


def run(settings: Settings) -> None:
  """Trains, or prints what would be trained.

  Raises:
    FlagError: if a flag asks for what cannot be.
  """
  extras.require("filelock", "grain", "orbax.checkpoint", "matplotlib")
  if settings.run.tensorboard:
    extras.require("tensorboardX")
  if settings.processes.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.processes.cpu_devices)
  if settings.network.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  is_read = settings.data is not None or not settings.dry_run
  images, config = rows.load(settings) if is_read else rows.unread(settings)
  if settings.dry_run:
    print(preview.text(settings, Program(config, images), images))
    return
  _run_or_end(settings, config, images)


COMMAND = Command(
  name="train",
  help="train a network on CIFAR as the paper does, or on your own images",
  settings=Settings,
  run=run,
)


def _run_or_end(
  settings: Settings, config: Config, images: data.Images
) -> None:
  """Joins the job, trains, and ends with the status that fits."""
  path, processes = settings.folder_of(config.name), settings.processes
  try:
    with contextlib.ExitStack() as stack:

      def hold():
        if message := files.make_directory(path):
          raise FlagError("--output", message)
        stack.enter_context(folder.lock(path))

      # Before the others come, who need not wait where it is held already. On a
      # pod nobody knows yet which process is the first.
      if not processes.distributed and not processes.process_id:
        hold()
      job.join(processes)
      if processes.distributed and jax.process_index() == 0:
        hold()
      _train(settings, config, images, path)
  except folder.RunError as error:
    job.end(f"{COMMAND.program}: error: {error}", 1)
  except signals.Interrupted as interrupted:
    job.end(*interrupted.args)
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    if isinstance(error, FlagError):
      job.end(f"{COMMAND.program}: error: {error}", 2)
    traceback.print_exc()
    job.end("", 1)


def _train(
  settings: Settings, config: Config, images: data.Images, path: pathlib.Path
) -> None:
  """Trains every seed, or what is left of it, and reports."""
  from fsam_optax.experiments.train import loop
  from fsam_optax.experiments.train import outcome

  begun_with = {
    "--recipe": settings.recipe,
    **config.by_flag(),
    "--data (SHA-256)": images.fingerprint(),
    "random numbers": _random_numbers(),
  }
  run = settings.run
  job.check_alike({**begun_with, **by_flag(run), **files.versions()})
  program = Program(config, images)
  # Before anything is written: the library checks its options in here.
  steps = {
    ascends: program.lower_step(ascends=ascends)
    for ascends in sorted({bool(x) for x in program.ascends})
  }
  text = "".join(step.as_text() for step in steps.values())
  job.check_alike({"the program": _digest(text)})
  job.check_shared(path)
  if job.is_first():
    defaults = by_flag(*(group() for group in GROUPS))
    if since := folder.check_config(path, begun_with, defaults):
      job.warn(f"the versions are not those of the beginning: {since}")
  runner, results = loop.Runner(program, steps, run), {}
  for seed in range(run.first_seed, run.first_seed + run.seeds):
    seeds_rows = rows.rows_of(images, config, seed)
    results[seed] = runner(seeds_rows, seed, path / f"seed-{seed}")
  if not job.is_first():
    return
  summary = outcome.summary(config, results)
  # Before anything is written, which may fail: the run is not lost by that.
  print(outcome.table(summary), flush=True)
  with folder.writing(path / "summary.json"):
    files.write_json(summary, path / "summary.json")
    outcome.draw(summary, results, path / "curves.png")
  print(f"\nwrote {path / 'summary.json'} and curves.png")


def _random_numbers() -> str:
  """A digest of a few draws: what a seed means depends on JAX's settings."""
  key = jax.random.key(0)
  draws = (
    jax.random.normal(key, (9,)),
    jax.random.randint(key, (9,), 0, 99),
    jax.random.key_data(jax.random.split(key, 9)),
  )
  return _digest("".join(f"{x.dtype}{np.asarray(x).tolist()}" for x in draws))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:16]

"""``train``: a network on CIFAR or other images, as the authors train it."""

import contextlib
import hashlib
import pathlib
import traceback

import jax

from fsam_optax.experiments import data
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import terminal
from fsam_optax.experiments.train import image_rows
from fsam_optax.experiments.train import job
from fsam_optax.experiments.train import preview
from fsam_optax.experiments.train import run_folder
from fsam_optax.experiments.train import signals
from fsam_optax.experiments.train.flags_and_recipes import Settings
from fsam_optax.experiments.train.flags_and_recipes import by_flag
from fsam_optax.experiments.train.program import Program

_PROGRAM = f"{terminal.PROGRAM} train"


def run(settings: Settings) -> None:
  """Trains a network on CIFAR as the paper does, or on your own images.

  Raises:
    FlagError: if a flag asks for what cannot be.
  """
  if settings.processes.cpu_devices:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", settings.processes.cpu_devices)
  if settings.network.dtype == "float64":
    jax.config.update("jax_enable_x64", True)
  images, config = image_rows.load(settings)
  if settings.dry_run:
    print(preview.text(settings, Program(config, images), images))
    return
  _run_or_end(config, images)


def _run_or_end(config: Settings, images: data.Images) -> None:
  path = config.folder_of(config.name_on(images.name))
  try:
    with contextlib.ExitStack() as stack:
      job.join(config.processes)
      if job.is_first():
        files.make_output(path)
        stack.enter_context(run_folder.lock(path))
      _train(config, images, path)
  except run_folder.RunError as error:
    job.end(f"{_PROGRAM}: error: {error}", 1)
  except signals.Interrupted as interrupted:
    job.end(*interrupted.args)
  except BaseException as error:
    if jax.process_count() == 1:
      raise
    if isinstance(error, flags.FlagError):
      job.end(f"{_PROGRAM}: error: {error}", 2)
    traceback.print_exc()
    job.end("", 1)


def _train(config: Settings, images: data.Images, path: pathlib.Path) -> None:
  from fsam_optax.experiments.train import loop
  from fsam_optax.experiments.train import outcome

  begun_with = {
    "--recipe": config.recipe,
    **config.by_flag(),
    "--data (SHA-256)": images.fingerprint(),
  }
  run = config.run
  job.check_alike({**begun_with, **by_flag(run), **files.versions()})
  program = Program(config, images)
  if not config.ascent.sync_perturbation:  # An ascent for each.
    begun_with["devices"] = program.mesh.size
  # Before anything is written: the library checks its options in here.
  step = program.lower_step()
  compiled = hashlib.sha256(step.as_text().encode()).hexdigest()[:16]
  job.check_alike({"the program": compiled})
  if job.is_first():
    # What an older run, which lacks a flag, was begun with.
    defaults = {**Settings().by_flag(), "devices": begun_with.get("devices")}
    if since := run_folder.check_config(path, begun_with, defaults):
      job.warn(f"the versions are not those of the beginning: {since}")
  job.check_shared(path / "config.json")
  runner, results = loop.Runner(program, step, run), {}
  for seed in range(run.first_seed, run.first_seed + run.seeds):
    seeds_rows = image_rows.rows_of(images, config, seed)
    results[seed] = runner(seeds_rows, seed, path / f"seed-{seed}")
  if not job.is_first():
    return
  summary = outcome.summary(config.name_on(images.name), config, results)
  # Before anything is written, which may fail: the run is not lost by that.
  print(outcome.table(summary), flush=True)
  with run_folder.writing(path / "summary.json"):
    files.write_json(summary, path / "summary.json")
  print(f"\nwrote {path / 'summary.json'}")

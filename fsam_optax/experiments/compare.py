"""``compare``: SGD, SAM and F-SAM on the same data, over many seeds."""

import argparse
from typing import Any

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments import extras
from fsam_optax.experiments import report
from fsam_optax.experiments import settings as settings_lib
from fsam_optax.experiments import training

NAME = "compare"
HELP = "train SGD, SAM and F-SAM on noisy labels and compare their accuracy"


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  settings_lib.add_flags(parser, is_grid=False)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Runs the command.

  Args:
    args: parsed flags.
    parser: to report a bad flag with.
  """
  extras.require("scipy.stats", "matplotlib.figure", "rich.progress")
  settings = settings_lib.check(args, parser, is_grid=False)
  result = compare(settings)
  json_path = settings.output / "compare.json"
  figure_path = settings.output / "compare.png"
  report.write_json(result, json_path)
  report.figure(result, figure_path)
  pool = settings.pool
  print(
    f"{pool.name}, {settings.model}, label noise {settings.label_noise:g}, "
    f"{len(settings.seeds)} seeds from {settings.seeds[0]}, "
    f"{settings.epochs} epochs; {pool.train_size} training, "
    f"{pool.validation_size} validation and {pool.test_size} test rows"
  )
  if not args.learning_rate or not args.rho:
    print(f"default learning rates and radii: {settings.origin}")
  print(f"\n{report.result_tables(result)}\n")
  print(f"wrote {json_path} and {figure_path}")


def compare(settings: settings_lib.Settings) -> dict[str, Any]:
  """Trains every optimizer on every seed.

  Args:
    settings: with one learning rate and one radius for each optimizer.

  Returns:
    What the JSON holds: ``config``, ``results`` and ``paired``.
  """
  splits = data.split(settings.pool, settings.seeds, settings.label_noise)
  number = len(settings.seeds)
  results, accuracy = {}, {}
  with report.progress() as start:
    for optimizer in settings.optimizers:
      (learning_rate,) = settings.learning_rate[optimizer]
      (rho,) = settings.rho.get(optimizer, (None,))
      outcome = settings.trainer(optimizer)(
        splits,
        np.full(number, learning_rate),
        np.full(number, rho or 0.0),
        on_epoch=start(report.label(optimizer), settings.epochs),
      )
      accuracy[optimizer] = outcome.test_accuracy
      results[optimizer] = _summary(settings, outcome, learning_rate, rho)
  return {
    "config": settings.config(),
    "results": results,
    "paired": report.paired(accuracy),
  }


def _summary(
  settings: settings_lib.Settings,
  outcome: training.Outcome,
  learning_rate: float,
  rho: float | None,
) -> dict[str, Any]:
  return {
    "learning_rate": learning_rate,
    "rho": rho,
    "test_accuracy": outcome.test_accuracy.tolist(),
    "train_accuracy": outcome.train_accuracy.tolist(),
    "validation_accuracy": outcome.validation_accuracy.tolist(),
    "curve": outcome.curve.mean(axis=1).tolist(),
    "curve_standard_error": [
      report.standard_error(row) for row in outcome.curve
    ],
    "diverged_seeds": [
      seed
      for seed, diverged in zip(settings.seeds, outcome.diverged, strict=True)
      if diverged
    ],
    "seconds": outcome.seconds,
    "compile_seconds": outcome.compile_seconds,
  }

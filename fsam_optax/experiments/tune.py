"""``tune``: learning rates and radii, chosen on the validation rows."""

import argparse
from typing import Any

import jax
import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments import extras
from fsam_optax.experiments import report
from fsam_optax.experiments import settings as settings_lib

NAME = "tune"
HELP = "choose each optimizer's learning rate and radius on validation rows"


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  settings_lib.add_flags(parser, is_grid=True)


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Runs the command.

  Args:
    args: parsed flags.
    parser: to report a bad flag with.
  """
  extras.require("rich.progress")
  settings = settings_lib.check(args, parser, is_grid=True)
  result = tune(settings)
  path = settings.output / "tune.json"
  report.write_json(result, path)
  print(
    f"validation accuracy %, {len(settings.seeds)} seeds from "
    f"{settings.seeds[0]}; rows are learning rates, columns radii\n"
  )
  for optimizer, grid in result["results"].items():
    print(f"{_table(optimizer, grid)}\n")
  best = {name: grid["best"] for name, grid in result["results"].items()}
  print(
    "--learning-rate "
    + ",".join(f"{k}={v['learning_rate']:g}" for k, v in best.items())
  )
  if radii := {k: v for k, v in best.items() if v["rho"] is not None}:
    print("--rho " + ",".join(f"{k}={v['rho']:g}" for k, v in radii.items()))
  for optimizer, grid in result["results"].items():
    for name in grid["on_edge"]:
      print(
        f"warning: the best {name} of {report.label(optimizer)}, "
        f"{grid['best'][name]:g}, lies on the edge of its grid. Widen the grid "
        f"with --{name.replace('_', '-')}"
      )
  print(f"wrote {path}")


def tune(settings: settings_lib.Settings) -> dict[str, Any]:
  """Trains every optimizer at every point of its grid.

  Args:
    settings: with grids of learning rates and radii.

  Returns:
    What the JSON holds: ``config``, and ``results`` with the mean validation
    accuracy after the last epoch at each point, its standard error, the best
    point and which of its coordinates lie on the edge of the grid.
  """
  splits = data.split(settings.pool, settings.seeds, settings.label_noise)
  results = {}
  with report.progress() as start:
    for optimizer in settings.optimizers:
      rates = settings.learning_rate[optimizer]
      radii = settings.rho.get(optimizer, ())
      on_epoch = start(report.label(optimizer), settings.epochs * len(rates))
      trainer = settings.trainer(optimizer)
      # One learning rate at a time: all radii and seeds run together, and all
      # learning rates share one compiled program.
      columns = len(radii) or 1
      repeated = jax.tree.map(
        lambda x, n=columns: np.tile(x, (n,) + (1,) * (x.ndim - 1)), splits
      )
      rows, diverged = [], []
      for rate in rates:
        outcome = trainer(
          repeated,
          np.full(columns * len(settings.seeds), rate),
          np.repeat(radii or (0.0,), len(settings.seeds)),
          with_curve=False,
          on_epoch=on_epoch,
        )
        by_radius = lambda x, n=columns: x.reshape(n, -1)
        rows.append(by_radius(outcome.validation_accuracy))
        diverged.append(by_radius(outcome.diverged).sum(axis=1))
      accuracy = np.array(rows)  # [learning rates, radii, seeds]
      results[optimizer] = _summary(rates, radii, accuracy, np.array(diverged))
  return {"config": settings.config(), "results": results}


def _summary(rates, radii, accuracy, diverged) -> dict[str, Any]:
  mean = accuracy.mean(axis=2)
  i, j = np.unravel_index(np.argmax(mean), mean.shape)
  on_edge = [
    name
    for name, k, axis in (("learning_rate", i, rates), ("rho", j, radii))
    if len(axis) > 1 and k in (0, len(axis) - 1)
  ]
  return {
    "learning_rate": list(rates),
    "rho": list(radii) or None,
    "validation_accuracy": mean.tolist(),
    "validation_accuracy_standard_error": [
      [report.standard_error(seeds) for seeds in row] for row in accuracy
    ],
    "diverged": diverged.tolist(),
    "best": {
      "learning_rate": rates[i],
      "rho": radii[j] if radii else None,
      "validation_accuracy": float(mean[i, j]),
    },
    "on_edge": on_edge,
  }


def _table(optimizer: str, grid: dict[str, Any]) -> str:
  radii = grid["rho"] or ["-"]
  return report.table(
    [report.label(optimizer), *(f"{radius}" for radius in radii)],
    [
      [f"{rate:g}", *map(report.with_error, means, errors)]
      for rate, means, errors in zip(
        grid["learning_rate"],
        grid["validation_accuracy"],
        grid["validation_accuracy_standard_error"],
        strict=True,
      )
    ],
  )

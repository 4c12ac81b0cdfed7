"""The tables and the figure of ``compare``, from what its JSON holds."""

import pathlib
from typing import Any

import numpy as np

from fsam_optax.experiments.common import figures
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables

PAIRS = (("fsam", "sam"), ("sam", "sgd"), ("fsam", "sgd"))
_HEADER = (
  "",
  "learning rate",
  "rho",
  "test accuracy %",
  "diverged",
  "seconds",
  "compiling",
)


def tables_of(report: dict[str, Any]) -> str:
  """The accuracies of the optimizers, and their paired differences."""
  rows = []
  for name, result in report["results"].items():
    accuracy = np.array(result["test_accuracy"])
    error = statistics.standard_error(accuracy)
    diverged = len(result["diverged_seeds"])
    rows.append(
      [
        optimizers.label(name),
        f"{result['learning_rate']:g}",
        "-" if result["rho"] is None else f"{result['rho']:g}",
        tables.with_error(accuracy.mean(), error),
        f"{diverged} of {len(accuracy)}",
        f"{result['seconds']:.1f}",
        f"{result['compile_seconds']:.1f}",
      ]
    )
  parts = [tables.table(_HEADER, rows)]
  rows = [
    [
      " over ".join(optimizers.label(part) for part in name.split("-")),
      tables.with_error(pair["mean"], pair["standard_error"], signed=True),
      "n/a" if pair["p_value"] is None else f"{pair['p_value']:.2g}",
    ]
    for name, pair in report["paired"].items()
  ]
  if rows:
    header = ["paired over seeds", "difference", "p"]
    parts.append(tables.table(header, rows))
  return "\n\n".join(parts)


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
  """Draws validation accuracy over training, one line an optimizer.

  Args:
    report: what the JSON holds.
    path: the PNG to write.
  """
  from matplotlib.ticker import MaxNLocator

  config = report["config"]
  drawing = figures.new(6.4, 4.0)
  axes = drawing.add_subplot()
  epochs = np.arange(1, config["epochs"] + 1)
  for name, result in report["results"].items():
    rho = "" if result["rho"] is None else f", rho {result['rho']:g}"
    rate = f"learning rate {result['learning_rate']:g}"
    figures.band(
      axes,
      epochs,
      result["curve"],
      figures.gaps(result["curve_standard_error"]),
      label=f"{optimizers.label(name)}: {rate}{rho}",
      color=optimizers.REGISTRY[name].color,
    )
  seeds = len(config["seeds"])
  axes.set_xlabel("epoch")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_ylabel("validation accuracy (%)")
  axes.set_title(
    f"{pathlib.Path(config['dataset']).name}, {config['model']}, label noise "
    f"{config['label_noise']:g}: mean ± standard error, {seeds} "
    f"seed{'s' if seeds > 1 else ''}",
    fontsize="medium",
  )
  axes.grid(alpha=0.3)
  axes.legend(loc="best")
  figures.save(drawing, path, dpi=150)

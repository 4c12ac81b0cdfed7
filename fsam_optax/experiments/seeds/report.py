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
  "weight decay",
  "test accuracy %",
  "median",
  "collapsed",
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
    runs = len(accuracy)
    rows.append(
      [
        optimizers.label(name),
        f"{result['learning_rate']:g}",
        "-" if result["rho"] is None else f"{result['rho']:g}",
        f"{result['weight_decay']:g}",
        tables.with_error(accuracy.mean(), error),
        f"{np.median(accuracy):.2f}",
        f"{statistics.collapsed(accuracy)} of {runs}",
        f"{len(result['diverged_seeds'])} of {runs}",
        f"{result['seconds']:.1f}",
        f"{result['compile_seconds']:.1f}",
      ]
    )
  parts = [tables.table(_HEADER, rows)]
  rows = [
    [
      _over(name),
      tables.with_error(pair["mean"], pair["standard_error"], signed=True),
      f"{pair['median']:+.2f}",
      f"{pair['above']} of {pair['seeds']}",
    ]
    for name, pair in report["paired"].items()
  ]
  if rows:
    header = ["paired over seeds", "difference", "median", "seeds above"]
    parts.append(tables.table(header, rows))
  return "\n\n".join(parts)


def _over(pair: str) -> str:
  return " over ".join(optimizers.label(part) for part in pair.split("-"))


def draw(report: dict[str, Any], path: pathlib.Path) -> None:
  """Draws validation accuracy over training, and its paired differences.

  Args:
    report: what the JSON holds.
    path: the PNG to write.
  """
  from matplotlib.ticker import MaxNLocator

  config = report["config"]
  epochs = np.arange(1, config["epochs"] + 1)
  drawing = figures.new(9.0 if report["paired"] else 5.4, 3.6)
  axes = drawing.subplots(1, 2 if report["paired"] else 1, squeeze=False)[0]
  ends = []
  for name, result in report["results"].items():
    rho = "" if result["rho"] is None else f", rho {result['rho']:g}"
    figures.band(
      axes[0],
      epochs,
      result["curve"],
      figures.gaps(result["curve_standard_error"]),
      label=(
        f"{optimizers.label(name)}: rate {result['learning_rate']:g}{rho}, "
        f"decay {result['weight_decay']:g}"
      ),
      color=optimizers.REGISTRY[name].color,
    )
    ends.append(result["curve"][-1])
  # From below the lowest curve's end, so that a point between two is seen.
  margin = max(3.0, max(ends) - min(ends))
  axes[0].set_ylim(min(ends) - margin, max(ends) + margin / 2)
  axes[0].set_ylabel("validation accuracy (%)")
  axes[0].legend(loc="lower right", fontsize="small")
  if report["paired"]:
    _draw_differences(axes[1], epochs, report["paired"])
  for panel in axes:
    panel.set_xlabel("epoch")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
  seeds = len(config["seeds"])
  drawing.suptitle(
    f"{pathlib.Path(config['dataset']).name}, {config['model']}, label noise "
    f"{config['label_noise']:g}: mean ± standard error, {seeds} "
    f"seed{'s' if seeds > 1 else ''}",
    fontsize="medium",
  )
  figures.save(drawing, path, dpi=150)


def _draw_differences(axes: Any, epochs: Any, paired: dict[str, Any]) -> None:
  ends = [0.0]
  for name, pair in paired.items():
    figures.band(
      axes,
      epochs,
      pair["curve"],
      figures.gaps(pair["curve_standard_error"]),
      label=_over(name),
      color=optimizers.REGISTRY[name.split("-")[0]].color
      if name != "fsam-sgd"
      else "#7f7f7f",
    )
    ends.append(pair["curve"][-1])
  margin = max(1.0, max(ends) - min(ends))
  axes.set_ylim(min(ends) - margin / 2, max(ends) + margin / 2)
  axes.axhline(0, color="black", linewidth=0.8)
  axes.set_ylabel("paired difference (points)")
  axes.legend(loc="best", fontsize="small")

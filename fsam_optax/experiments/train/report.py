"""What a run of ``train`` found: a summary, a table and the curves."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np

from fsam_optax.experiments.common import figures
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.train.config import Config


def summary(
  recipe: str, config: Config, results: dict[int, list[dict[str, Any]]]
) -> dict[str, Any]:
  """The outcome over the seeds, as its JSON holds it.

  Args:
    recipe: its name.
    config: the configuration.
    results: one line an epoch, for each seed.

  Returns:
    The evaluated accuracy after the last epoch of each seed, in percent, their
    mean and its standard error, and which epoch was the best of each.
  """
  first = next(iter(results.values()))
  name = next(k for k in first[-1] if k.endswith("_accuracy"))
  final = np.array([lines[-1][name] for lines in results.values()])
  return {
    "recipe": recipe,
    "config": dataclasses.asdict(config),
    "evaluated": name.removesuffix("_accuracy"),
    "seeds": list(results),
    "final_accuracy": final.tolist(),
    "mean": float(final.mean()),
    "standard_error": statistics.standard_error(final),
    "best_epoch": [
      max(lines, key=lambda line: (line[name], line["epoch"]))["epoch"]
      for lines in results.values()
    ],
    "versions": files.versions(),
    "device": jax.devices()[0].device_kind,
  }


def table(found: dict[str, Any]) -> str:
  """The outcome for a terminal."""
  rows = [
    [str(seed), f"{accuracy:.2f}", str(epoch)]
    for seed, accuracy, epoch in zip(
      found["seeds"], found["final_accuracy"], found["best_epoch"], strict=True
    )
  ]
  rows.append(
    ["mean", tables.with_error(found["mean"], found["standard_error"]), ""]
  )
  text = tables.table(
    ["seed", f"{found['evaluated']} accuracy %, last epoch", "best epoch"], rows
  )
  if found["evaluated"] == "test":
    text += (
      "\n\nThe best epoch is that of the test accuracy: a result is the last "
      "one's. --validation holds rows out to choose by."
    )
  return text


def write(
  found: dict[str, Any],
  results: dict[int, list[dict[str, Any]]],
  folder: pathlib.Path,
) -> None:
  """Writes ``summary.json`` and ``curves.png``."""
  files.write_json(found, folder / "summary.json")
  _curves(found, results, folder / "curves.png")


def _curves(
  found: dict[str, Any],
  results: dict[int, list[dict[str, Any]]],
  path: pathlib.Path,
) -> None:
  """Draws the epochs of all seeds, each panel over the epochs."""
  evaluated = found["evaluated"]
  panels: list[tuple[str, dict[str, str]]] = [
    (
      "accuracy (%)",
      {"training": "accuracy", evaluated: f"{evaluated}_accuracy"},
    ),
    ("loss", {"training": "loss", evaluated: f"{evaluated}_loss"}),
    ("sharpness", {"training": "sharpness"}),
  ]
  drawing = figures.new(10.8, 3.4)
  for i, (label, series) in enumerate(panels):
    axes = drawing.add_subplot(1, len(panels), i + 1)
    for name, field in series.items():
      values = np.array(
        [
          figures.gaps([line[field] for line in lines])
          for lines in results.values()
        ]
      )
      epochs = np.arange(1, values.shape[1] + 1)
      error = np.full(len(epochs), np.nan)
      if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
      figures.band(axes, epochs, values.mean(0), error, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
  seeds = len(found["seeds"])
  optimizer = optimizers.label(found["config"]["ascent"]["optimizer"])
  drawing.suptitle(
    f"{found['recipe']}, {optimizer}: {seeds} seed"
    + ("s, mean ± standard error" if seeds > 1 else ""),
    fontsize="small",
  )
  figures.save(drawing, path)

"""What a run of ``train`` came to: a summary and a table."""

from typing import Any

import jax
import numpy as np

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.train.checkpoints import best
from fsam_optax.experiments.train.flag_checks import Config

Results = dict[int, list[dict[str, Any]]]
"""One line an epoch, for each seed."""


def summary(config: Config, results: Results) -> dict[str, Any]:
  """The outcome over the seeds, as its JSON holds it; accuracies in percent."""
  first = next(iter(results.values()))
  name = next(k for k in first[-1] if k.endswith("_accuracy"))
  final = [lines[-1][name] for lines in results.values()]
  return {
    "name": config.name,
    "config": config.by_flag(),
    "evaluated": name.removesuffix("_accuracy"),
    "seeds": list(results),
    "final_accuracy": final,
    "mean": float(np.mean(final)),
    "standard_error": statistics.standard_error(final),
    "best_epoch": [best(lines)["epoch"] for lines in results.values()],
    "best_checkpoint": [best(lines)["batches"] for lines in results.values()],
    "versions": files.versions(),
    "device": jax.devices()[0].device_kind,
  }


def table(outcome: dict[str, Any]) -> str:
  """The outcome for a terminal."""
  columns = (outcome[x] for x in ("seeds", "final_accuracy", "best_epoch"))
  rows = [
    [str(seed), f"{accuracy:.2f}", str(epoch)]
    for seed, accuracy, epoch in zip(*columns, strict=True)
  ]
  rows.append(
    ["mean", tables.with_error(outcome["mean"], outcome["standard_error"]), ""]
  )
  evaluated = outcome["evaluated"]
  text = tables.table(
    ["seed", f"{evaluated} accuracy %, last epoch", "best epoch"], rows
  )
  config = outcome["config"]
  optimizer = optimizers.REGISTRY[config["--optimizer"]].label
  noise = f"label noise {config['--label-noise']:g}"
  text = f"{outcome['name']}, {optimizer}, {noise}\n\n{text}"
  if evaluated == "test":
    text += (
      "\n\nThe best epoch is that of the test accuracy: a result is the last "
      "one's. --validation holds rows out to choose by."
    )
  return text

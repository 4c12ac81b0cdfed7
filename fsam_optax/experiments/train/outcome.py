"""What a run of ``train`` came to: a summary and a table."""

from typing import Any

import jax

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.train.checkpoints import best
from fsam_optax.experiments.train.flags_and_recipes import Settings


def summary(
  name: str, config: Settings, results: dict[int, list[dict[str, Any]]]
) -> dict[str, Any]:
  """The outcome of each seed's lines, one an epoch; accuracies in percent."""
  first = next(iter(results.values()))
  what = next(k for k in first[-1] if k.endswith("_accuracy"))
  final = [lines[-1][what] for lines in results.values()]
  mean, error = statistics.mean_and_error(final)
  return {
    "name": name,
    "config": config.by_flag(),
    "evaluated": what.removesuffix("_accuracy"),
    "seeds": list(results),
    "final_accuracy": final,
    "mean": mean,
    "standard_error": error,
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

"""``tune``: hyperparameters of each optimizer, chosen on validation rows."""

from typing import Any

import numpy as np

from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import shared_flags
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.shared_flags import Settings
from fsam_optax.experiments.lab.store import Store

_SHOWN = 10  # Points of each optimizer.


def run(given: Settings) -> None:
  """Chooses learning rate, radius and weight decay on validation rows."""
  output = given.output
  grids = shared_flags.grids(given, is_grid=True)
  lab = shared_flags.laboratory(
    given, tuned_values.TUNING_SEEDS, tuned_values.TUNING_FIRST_SEED
  ).at(store=Store(output / "tune.jsonl"))
  print(
    f"{lab.pool.name}, {lab.model}, label noise {lab.label_noise:g}: "
    f"validation accuracy %, {len(lab.seeds)} seeds from {lab.seeds[0]}",
    flush=True,
  )
  with progress.Bars() as bars:
    lab = lab.at(progress=bars.bar)
    found = {name: lab.choose(name, grid) for name, grid in grids.items()}
  paired_report.publish(
    {
      "config": lab.config() | {"optimizers": list(found)},
      "results": {
        name: {"best": of.best._asdict(), "on_edge": of.on_edge}
        for name, of in found.items()
      },
      "tables": [_table(name, of) for name, of in found.items()],
    },
    "tune",
    output,
  )
  for what in search.Point._fields:
    chosen = [
      f"{name}={getattr(of.best, what):g}"
      for name, of in found.items()
      if what in shared_flags.fields_of(name)
    ]
    if chosen:
      print(f"--{what.replace('_', '-')} {','.join(chosen)}")
  for name, of in found.items():
    if of.diverged:
      print(
        f"warning: {of.diverged} of {len(lab.seeds)} runs of "
        f"{optimizers.REGISTRY[name].label} diverged at its best point. Choose "
        "smaller learning rates"
      )
    for what in of.on_edge:
      print(
        f"warning: the best {what} of {optimizers.REGISTRY[name].label}, "
        f"{getattr(of.best, what):g}, lies at the end of its values, which "
        f"went on {search.MOST_EXTENSIONS} times. Move the grid with "
        f"--{what.replace('_', '-')}"
      )


def _table(name: str, found: search.Found) -> dict[str, Any]:
  order = np.argsort(-found.accuracy.mean(axis=1), kind="stable")[:_SHOWN]
  rows = [
    [*found.points[i], paired_report.accuracy(found.accuracy[i])] for i in order
  ]
  label = optimizers.REGISTRY[name].label
  title = f"{label}, the best of {len(found.points)} points"
  fields = [what.replace("_", " ") for what in search.Point._fields]
  header = [*fields, "validation accuracy (%)"]
  return {"title": title, "header": header, "rows": rows}

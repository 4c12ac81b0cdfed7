"""``compare``: SGD, SAM and F-SAM on the same data, over many seeds."""

from typing import Any, Mapping

import numpy as np

from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import shared_flags
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.shared_flags import Settings
from fsam_optax.experiments.lab.store import Row


def run(given: Settings) -> None:
  """Compares the accuracy of SGD, SAM and F-SAM on noisy labels."""
  recipe = shared_flags.recipe_of(given.data)
  grids = shared_flags.grids(given, is_grid=False)
  lab = shared_flags.laboratory(given, recipe.seeds, tuned_values.FIRST_SEED)
  with progress.Bars() as bars:
    lab = lab.at(progress=bars.bar, trainer_options={"has_curve": True})
    rows = {
      name: lab.run(name, grid.points()[0], lab.seeds, "test")
      for name, grid in grids.items()
    }
  pool = lab.pool
  print(
    f"{pool.name}, {lab.model}, label noise {lab.label_noise:g}, "
    f"{len(lab.seeds)} seeds from {lab.seeds[0]}, {lab.epochs} epochs; "
    f"{pool.train_size} training, {pool.validation_size} validation and "
    f"{pool.test_size} test rows"
  )
  if any(
    not {"", name} & getattr(given, what).keys()
    for name in rows
    for what in shared_flags.fields_of(name)
  ):
    print(f"default hyperparameters: {recipe.origin}")
  config = lab.config() | {"optimizers": list(rows)}
  del config["search_seeds"]  # No seed of it chooses.
  result = {"config": config, **_report(rows)}
  title = paired_report.title_of(config)
  paired_report.publish(result, "compare", given.output, title)


def _report(rows: Mapping[str, Row]) -> dict[str, Any]:
  """What the JSON holds of the optimizers, each paired with those before it."""
  names = [name for name in optimizers.REGISTRY if name in rows]
  pairs = [  # Those of neighbors first.
    (names[i], names[i - gap])
    for gap in range(1, len(names))
    for i in range(len(names) - 1, gap - 1, -1)
  ]
  label = lambda name: optimizers.REGISTRY[name].label
  over = lambda first, other: f"{label(first)} over {label(other)}"
  differences = {
    (one, other): paired_report.difference(rows[one], rows[other])
    for one, other in pairs
  }
  before, table = dict(zip(names[1:], names, strict=False)), []
  for name, row in rows.items():
    cell: Any = ""
    if other := before.get(name):
      cell = {**differences[name, other], "over": label(other)}
      cell.pop("median", None)
    rho = row["rho"] if name in optimizers.ASCENDING else ""
    point = [row["learning_rate"], rho, row["weight_decay"]]
    accuracy = paired_report.accuracy(row["test_accuracy"])
    table.append([label(name), *point, accuracy, cell])
  header = ["", "learning rate", "rho", "weight decay", "test accuracy (%)"]
  tables = [{"header": [*header, "paired difference"], "rows": table}]
  if pairs:
    paired = [[over(*pair), cell] for pair, cell in differences.items()]
    header = ["paired over seeds", "difference"]
    tables.insert(0, {"header": header, "rows": paired})
  curve = {name: np.array(row["curve"]).T for name, row in rows.items()}
  epochs = range(1, len(curve[names[0]]) + 1)
  # The curves begin far below, and far from each other.
  lowest = min(x[-1].mean() for x in curve.values())
  of_one = [figures.line(label(x), epochs, curve[x]) for x in names]
  panels = [
    figures.panel(
      "epoch", of_one, "validation accuracy (%)", ylim=(lowest - 3, None)
    )
  ]
  if pairs:
    of_two = {pair: curve[pair[0]] - curve[pair[1]] for pair in pairs}
    most = max(1.0, *(2 * abs(x[-1].mean()) for x in of_two.values()))
    lines = [figures.line(over(*x), epochs, y) for x, y in of_two.items()]
    name = "paired difference (points)"
    panels.append(figures.panel("epoch", lines, name, ylim=(-most, most)))
  return {"results": rows, "tables": tables, "panels": panels}

"""``compare``: SGD, SAM and F-SAM on the same data, over many seeds."""

from typing import Any

import numpy as np

from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import shared_flags
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.trainer import Outcome

_GRAY = "#7f7f7f"


def run(given: shared_flags.Settings) -> None:
  """Runs the command."""
  recipe = shared_flags.recipe_of(given.data)
  grids = shared_flags.grids(given, is_grid=False)
  points = {name: grid.points()[0] for name, grid in grids.items()}
  lab = shared_flags.laboratory(given, recipe.seeds, tuned_values.FIRST_SEED)
  result = report(lab, points, train(lab, points))
  pool = lab.pool
  print(
    f"{pool.name}, {lab.model}, label noise {lab.label_noise:g}, "
    f"{len(lab.seeds)} seeds from {lab.seeds[0]}, {lab.epochs} epochs; "
    f"{pool.train_size} training, {pool.validation_size} validation and "
    f"{pool.test_size} test rows"
  )
  if not (given.learning_rate and given.rho and given.weight_decay):
    print(f"default hyperparameters: {recipe.origin}")
  title = paired_report.title_of(result["config"])
  output, panels = given.training.output, _panels(result)
  paired_report.publish(result, "compare", output, title, panels)


COMMAND = flags.Command(
  name="compare",
  help="train SGD, SAM and F-SAM on noisy labels and compare their accuracy",
  settings=shared_flags.Settings,
  run=run,
)


def train(lab: Lab, points: dict[str, Point]) -> dict[str, Outcome]:
  """Trains every optimizer at its point, on all seeds at once."""
  splits, number, outcomes = lab.splits(lab.seeds), len(lab.seeds), {}
  with progress.Bars() as bars:
    for name, point in points.items():
      outcomes[name] = lab.trainer(
        name,
        splits,
        *(np.full(number, value) for value in point),
        with_curve=True,
        on_epoch=bars.start(optimizers.label(name), lab.epochs),
      )
  return outcomes


def report(
  lab: Lab, points: dict[str, Point], outcomes: dict[str, Outcome]
) -> dict[str, Any]:
  """What the JSON holds: ``config``, ``results``, ``paired`` and ``tables``."""
  results = {}
  for name, found in outcomes.items():
    results[name] = points[name]._asdict() | _summary(lab.seeds, found)
    if name not in optimizers.ASCENDING:
      results[name]["rho"] = None
  paired = {
    f"{first}-{second}": _paired(outcomes[first], outcomes[second])
    for first, second in _pairs(outcomes)
  }
  return {
    "config": lab.config() | {"optimizers": list(outcomes)},
    "results": results,
    "paired": paired,
    "tables": _tables(results, paired),
  }


def _pairs(names: Any) -> list[tuple[str, str]]:
  """Each optimizer over those before it, its neighbor first."""
  ordered = [name for name in optimizers.REGISTRY if name in names]
  last = len(ordered) - 1
  return [
    (ordered[i], ordered[i - gap])
    for gap in range(1, last + 1)
    for i in range(last, gap - 1, -1)
  ]


def _paired(first: Outcome, second: Outcome) -> dict[str, Any]:
  difference = first.curve - second.curve
  return {
    **statistics.paired(first.test_accuracy, second.test_accuracy),
    "curve": difference.mean(axis=1).tolist(),
    "curve_standard_error": [statistics.standard_error(x) for x in difference],
  }


def _summary(seeds: Any, outcome: Outcome) -> dict[str, Any]:
  errors = [statistics.standard_error(row) for row in outcome.curve]
  numbered = zip(seeds, outcome.diverged, strict=True)
  return {
    "test_accuracy": outcome.test_accuracy.tolist(),
    "train_accuracy": outcome.train_accuracy.tolist(),
    "validation_accuracy": outcome.validation_accuracy.tolist(),
    "curve": outcome.curve.mean(axis=1).tolist(),
    "curve_standard_error": errors,
    "diverged_seeds": [seed for seed, diverged in numbered if diverged],
    "seconds": outcome.seconds,
  }


def _tables(results, paired) -> list[dict[str, Any]]:
  tables, rows, below = [], [], dict(reversed(_pairs(results)))
  if paired:
    header = ["paired over seeds", "difference", "median", "seeds above"]
    differences = [
      [
        _over(*pair),
        _difference(of),
        f"{of['median']:+.2f}",
        f"{of['above']} of {of['seeds']}",
      ]
      for pair, of in zip(_pairs(results), paired.values(), strict=True)
    ]
    tables.append({"header": header, "rows": differences})
  for name, row in results.items():
    rho = "" if row["rho"] is None else row["rho"]
    accuracy = paired_report.accuracy(row["test_accuracy"])
    if diverged := len(row["diverged_seeds"]):
      accuracy["diverged"] = diverged
    difference: Any = ""
    if name in below:
      pair = paired[f"{name}-{below[name]}"]
      difference = _difference(pair) | {"over": optimizers.label(below[name])}
    point = [row["learning_rate"], rho, row["weight_decay"]]
    rows.append([optimizers.label(name), *point, accuracy, difference])
  header = ["", "learning rate", "rho", "weight decay", "test accuracy (%)"]
  return [*tables, {"header": [*header, "paired difference"], "rows": rows}]


def _difference(pair: dict[str, Any]) -> dict[str, Any]:
  return {"difference": pair["mean"], "error": pair["standard_error"]}


def _over(first: str, second: str) -> str:
  return f"{optimizers.label(first)} over {optimizers.label(second)}"


def _panels(result: dict[str, Any]) -> list[dict[str, Any]]:
  """Validation accuracy over training, and its paired differences."""
  results, paired = result["results"], result["paired"]
  color = lambda name: optimizers.REGISTRY[name].color
  lines = [
    _line(_label(name, row), row, color(name)) for name, row in results.items()
  ]
  lowest = min(line["mean"][-1] for line in lines)
  panels = [
    # The curves begin far below.
    figures.panel(
      "epoch", lines, "validation accuracy (%)", ylim=(lowest - 3, None)
    )
  ]
  lines = []
  for i, pair in enumerate(_pairs(results)):
    is_next = i < len(results) - 1  # The pairs of neighbors come first.
    line = _line(_over(*pair), paired["-".join(pair)], color(pair[0]))
    lines.append(line if is_next else line | {"color": _GRAY})
  if lines:
    most = max(1.0, *(2 * abs(line["mean"][-1]) for line in lines))
    name = "paired difference (points)"
    panels.append(figures.panel("epoch", lines, name, ylim=(-most, most)))
  return panels


def _label(name: str, row: dict[str, Any]) -> str:
  rho = "" if row["rho"] is None else f", rho {row['rho']:g}"
  rate, decay = row["learning_rate"], row["weight_decay"]
  return f"{optimizers.label(name)}: rate {rate:g}{rho}, decay {decay:g}"


def _line(label: str, row: dict[str, Any], color: str) -> dict[str, Any]:
  return {
    "label": label,
    "x": range(1, len(row["curve"]) + 1),
    "mean": row["curve"],
    "error": row["curve_standard_error"],
    "color": color,
  }

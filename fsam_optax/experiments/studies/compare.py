"""``compare``: SGD, SAM and F-SAM on the same data, over many seeds."""

from typing import Any

import numpy as np

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import settings
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.trainer import Outcome

_GRAY = "#7f7f7f"
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


def run(given: settings.Settings) -> None:
  """Runs the command."""
  extras.require("scipy.stats", "matplotlib.figure", "rich.progress")
  recipe = settings.recipe_of(given.data)
  grids = settings.grids(given, is_grid=False)
  points = {name: grid.points()[0] for name, grid in grids.items()}
  lab = settings.laboratory(given, recipe.seeds, tuned_values.FIRST_SEED)
  result = report(lab, points, train(lab, points))
  pool, output = lab.pool, given.training.output
  print(
    f"{pool.name}, {lab.model}, label noise {lab.label_noise:g}, "
    f"{len(lab.seeds)} seeds from {lab.seeds[0]}, {lab.epochs} epochs; "
    f"{pool.train_size} training, {pool.validation_size} validation and "
    f"{pool.test_size} test rows"
  )
  if not (given.learning_rate and given.rho and given.weight_decay):
    print(f"default hyperparameters: {recipe.origin}")
  *printed, _ = result["tables"]  # The last is short, for a page.
  print("\n" + "\n\n".join(map(tables.text, printed)) + "\n", flush=True)
  json_path, figure_path = output / "compare.json", output / "compare.png"
  with files.saving(output):
    files.write_json(result, json_path)
    title = paired_report.title_of(result["config"])
    paired_report.draw(title, _panels(result), figure_path)
  print(f"wrote {json_path} and {figure_path}")


COMMAND = flags.Command(
  name="compare",
  help="train SGD, SAM and F-SAM on noisy labels and compare their accuracy",
  settings=settings.Settings,
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
    "compile_seconds": outcome.compile_seconds,
  }


def _tables(results, paired) -> list[dict[str, Any]]:
  """The optimizers, their paired differences, and both in short."""
  rows, short = [], []
  below = {first: second for first, second in reversed(_pairs(results))}
  for name, row in results.items():
    accuracy = np.array(row["test_accuracy"])
    runs = len(accuracy)
    mean = paired_report.mean(accuracy)
    rates = [optimizers.label(name), row["learning_rate"]]
    rows.append(
      [
        *rates,
        "-" if row["rho"] is None else row["rho"],
        row["weight_decay"],
        mean,
        f"{np.median(accuracy):.2f}",
        f"{statistics.collapsed(accuracy)} of {runs}",
        f"{len(row['diverged_seeds'])} of {runs}",
        f"{row['seconds']:.1f}",
        f"{row['compile_seconds']:.1f}",
      ]
    )
    cell: Any = ""
    if name in below:
      pair = paired[f"{name}-{below[name]}"]
      cell = _difference(pair) | {"over": optimizers.label(below[name])}
    rho = "" if row["rho"] is None else row["rho"]
    short.append([*rates, rho, row["weight_decay"], mean, cell])
  found = [{"header": _HEADER, "rows": rows}]
  if paired:
    differences = [
      [
        _over(*pair),
        _difference(of),
        f"{of['median']:+.2f}",
        f"{of['above']} of {of['seeds']}",
      ]
      for pair in _pairs(results)
      if (of := paired["-".join(pair)])
    ]
    header = ["paired over seeds", "difference", "median", "seeds above"]
    found.append({"header": header, "rows": differences})
  header = [*_HEADER[:4], "test accuracy (%)", "paired difference"]
  return [*found, {"header": header, "rows": short}]


def _difference(pair: dict[str, Any]) -> dict[str, Any]:
  return {"difference": pair["mean"], "error": pair["standard_error"]}


def _over(first: str, second: str) -> str:
  return f"{optimizers.label(first)} over {optimizers.label(second)}"


def _panels(result: dict[str, Any]) -> list[dict[str, Any]]:
  """Validation accuracy over training, and its paired differences."""
  results, paired = result["results"], result["paired"]
  lines = [
    _line(_label(name, row), row, optimizers.REGISTRY[name].color)
    for name, row in results.items()
  ]
  # From below the lowest curve's end, so that a point between two is seen.
  panels = [_panel("validation accuracy (%)", lines, least=3.0, below=1.0)]
  lines = []
  for i, pair in enumerate(_pairs(results)):
    is_next = i < len(results) - 1  # The pairs of neighbors come first.
    color = optimizers.REGISTRY[pair[0]].color if is_next else _GRAY
    lines.append(_line(_over(*pair), paired["-".join(pair)], color))
  if lines:
    name = "paired difference (points)"
    panels.append(_panel(name, lines, 0.0, least=1.0, below=0.5))
  return panels


def _panel(ylabel, lines, *shown: float, least: float, below: float):
  ends = [*shown, *(line["mean"][-1] for line in lines)]
  low, high = min(ends), max(ends)
  margin = max(least, high - low)
  return {
    "xlabel": "epoch",
    "ylabel": ylabel,
    "series": lines,
    "ylim": (low - below * margin, high + margin / 2),
  }


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

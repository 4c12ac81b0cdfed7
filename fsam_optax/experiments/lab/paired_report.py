"""What a study reports: arms paired over seeds, in tables and panels.

Cells are those of :mod:`fsam_optax.experiments.common.tables`.
"""

import pathlib
from typing import Any, Mapping, Sequence

import numpy as np

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import bootstrap
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab.store import Results
from fsam_optax.experiments.lab.store import Row


def accuracy(values: Any) -> dict[str, Any]:
  """Mean and standard error in percent, and what a mean alone would hide.

  That is how many runs diverged, and where some collapsed how many, and the
  median.
  """
  average, error = statistics.mean_and_error(values)
  finite = statistics.finite(values)
  cell: dict[str, Any] = {"accuracy": average, "error": error}
  if collapsed := statistics.collapsed(values):
    cell |= {"median": float(np.median(finite)), "collapsed": collapsed}
  if diverged := len(values) - len(finite):
    cell["diverged"] = diverged
  return cell


def number(values: Any) -> dict[str, Any]:
  """Mean and standard error of what is finite."""
  average, error = statistics.mean_and_error(values)
  return {"value": average, "error": error}


def by_setting(
  results: Results, pairs: Sequence[tuple[str, str]], xlabel: str = ""
) -> dict[str, Any]:
  """What the JSON holds of a few arms in several settings, a row a setting.

  Args:
    results: a row of the store for each arm, by setting.
    pairs: of arms; the first is shown over the second.
    xlabel: what the settings are, where they are numbers.
  """
  arms = list(dict.fromkeys(name for x in results.values() for name in x))
  x = [float(title) for title in results] if xlabel else list(results)
  of = lambda name: [
    np.asarray(rows[name]["test_accuracy"], float) if name in rows else [np.nan]
    for rows in results.values()
  ]
  header = [xlabel, *arms, *(f"{one} over {other}" for one, other in pairs)]
  differences = [
    figures.line(
      f"{one} over {other}",
      x,
      [np.subtract(*both) for both in zip(of(one), of(other), strict=True)],
    )
    for one, other in pairs
  ]
  rows = [
    [
      title,
      *(accuracy(of[x]["test_accuracy"]) if x in of else "" for x in arms),
      *(
        difference(of[one], of[other]) if {one, other} <= of.keys() else ""
        for one, other in pairs
      ),
    ]
    for title, of in results.items()
  ]
  return {
    "results": results,
    "tables": [{"header": header, "rows": rows}, points_table(results, xlabel)],
    "panels": [
      figures.panel(xlabel, [figures.line(y, x, of(y)) for y in arms]),
      figures.panel(xlabel, differences, "paired difference (points)"),
    ],
  }


def by_arm(results: Results, reference: str = "F-SAM") -> dict[str, Any]:
  """What the JSON holds of many arms in a few settings, a row an arm.

  Of the reference it shows the accuracy, of the others the difference from it.
  """
  arms = list(dict.fromkeys(name for x in results.values() for name in x))

  def cell(name, of):
    if name not in of:
      return ""
    if name == reference or reference not in of:
      return accuracy(of[name]["test_accuracy"])
    return _short_difference(of[name], of[reference])

  header = ["", *results]
  rows = [[name, *(cell(name, of) for of in results.values())] for name in arms]
  costs: list[Any] = [
    {of[name].get("gradients") for of in results.values() if name in of}
    for name in arms
  ]
  if None not in set().union(*costs):
    header.insert(1, "gradients")
    for row, of_arm in zip(rows, costs, strict=True):
      ends = dict.fromkeys(f"{f(of_arm):.3g}" for f in (min, max))
      row.insert(1, " to ".join(ends))
    # The cheapest first.
    order = np.argsort([min(x) for x in costs], kind="stable")
    rows = [rows[i] for i in order]
  return {
    "results": results,
    "tables": [{"header": header, "rows": rows}, points_table(results)],
    "panels": [
      figures.panel(
        "",
        [figures.line("", of, [row["test_accuracy"] for row in of.values()])],
        title=title,
      )
      for title, of in results.items()
    ],
  }


def points_table(results: Results, what: str = "") -> dict[str, Any]:
  """The hyperparameters that were chosen, and from how many points."""
  rows = []
  for title, of in results.items():
    for name, row in of.items():
      fields = ("learning_rate", "rho", "weight_decay")
      cells = [
        "-" if row[x] is None else float(f"{row[x]:.3g}") for x in fields
      ]
      ends = ", ".join(row.get("on_edge", ()))
      rows.append([title, name, *cells, len(row.get("grid", ())), ends])
  header = ["learning rate", "rho", "weight decay", "points tried"]
  return {
    "header": [what, "", *header, "at the end of its values"],
    "rows": rows,
  }


def _short_difference(first: Row, second: Row) -> dict[str, Any]:
  """A difference; a median only where runs collapsed or diverged."""
  cell = difference(first, second)
  cell["error"] = cell.pop("search_error", cell["error"])
  accuracies = [x["test_accuracy"] for x in (first, second)]
  if not any(
    accuracy(x).keys() & {"collapsed", "diverged"} for x in accuracies
  ):
    cell.pop("median", None)
  return cell


def difference(first: Row, second: Row) -> dict[str, Any]:
  """A paired difference with its median, and the error that the search adds.

  It is of the seeds where neither row diverged. What makes a seed easy or hard
  cancels in it, so that its error is a fraction of that of the means.
  """
  both = np.asarray([x["test_accuracy"] for x in (first, second)], float)
  pairs = statistics.finite(np.subtract(*both))
  average, error = statistics.mean_and_error(pairs)
  cell: dict[str, Any] = {"difference": average, "error": error}
  if average is None:
    return cell
  is_of_search = "candidates" in first and "candidates" in second
  if is_of_search and error is not None:  # It is None by one seed.
    both = first["candidates"], second["candidates"]
    # Draws of few seeds vary less than the seeds do.
    cell["search_error"] = max(bootstrap.error_with_search(*both), error)
  return cell | {"median": float(np.median(pairs))}


def title_of(config: Mapping[str, Any]) -> str:
  """What was trained on what."""
  shown = {
    what: ", ".join(f"{x}" for x in value) if isinstance(value, list) else value
    for what, value in config.items()
  }
  seeds = len(config["seeds"])
  return (
    f"{pathlib.Path(shown['dataset']).name}, {shown['model']}, label noise "
    f"{shown['label_noise']}, {seeds} seed{'s' if seeds > 1 else ''}"
  )


def publish(
  result: Mapping[str, Any], name: str, directory: pathlib.Path, title: str = ""
) -> None:
  """Prints the tables of a result, then writes NAME.json.

  Where it has panels it draws them in NAME.png, below the title.
  """
  for table in result["tables"]:
    print(f"\n{tables.text(table)}", flush=True)
  paths = [directory / f"{name}.json"]
  with files.naming_output(directory):
    files.write_json(result, paths[0])
    if panels := result.get("panels"):
      paths.append(directory / f"{name}.png")
      figures.draw(title, panels, paths[1])
  print("\nwrote", " and ".join(map(str, paths)))

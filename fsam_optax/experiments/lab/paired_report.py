"""What a study reports: arms paired over seeds in cells, tables and figures.

A cell is a number that a table shows; see
:mod:`fsam_optax.experiments.common.tables`.
"""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from fsam_optax.experiments.common import figures
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab.store import Row

UNTUNED = "Weight decay 5e-4, not tuned."


def accuracy(values: Any) -> dict[str, Any]:
  """Mean and standard error in percent, and what a mean alone would hide.

  That is how many runs diverged, which it leaves out, and where some collapsed
  how many, and the median.
  """
  average, error = statistics.mean_and_error(values)
  values = np.asarray(values, np.float64)
  finite = values[np.isfinite(values)]
  cell: dict[str, Any] = {"accuracy": average, "error": error}
  if collapsed := statistics.collapsed(values):
    cell |= {"median": float(np.median(finite)), "collapsed": collapsed}
  if diverged := len(values) - len(finite):
    cell["diverged"] = diverged
  return cell


def mean(values: Any) -> dict[str, Any]:
  """Mean and standard error in percent of all values, which are finite."""
  error = statistics.standard_error(values)
  return {"accuracy": float(np.mean(values)), "error": error}


def number(values: Any) -> dict[str, Any]:
  """Mean and standard error of what is finite."""
  return dict(
    zip(("value", "error"), statistics.mean_and_error(values), strict=True)
  )


def over(first: Any, second: Any) -> dict[str, Any]:
  """A paired difference with its p-value."""
  found = statistics.paired(first, second)
  cell = {"difference": found["mean"], "error": found["standard_error"]}
  p_value = found["p_value"]
  return cell if p_value is None else cell | {"p": float(f"{p_value:.1g}")}


def arms_table(
  results: Mapping[str, Row], others: Sequence[str], what: str = ""
) -> dict[str, Any]:
  """A row an arm: how it was trained, its accuracy, and over what by how much.

  What is the same for all, or known of none, has no column.

  Args:
    results: a row of the store for each arm.
    others: arms that the rest is compared with.
    what: the arms are.
  """
  has_gradients = all("gradients" in row for row in results.values())
  if has_gradients:
    results = dict(sorted(results.items(), key=lambda x: x[1]["gradients"]))
  rows = list(results.values())
  columns: dict[str, Any] = {what: results}
  if has_gradients:
    columns["gradients"] = (row["gradients"] for row in rows)
  for field in search.Point._fields:
    values = [row[field] for row in rows]
    if field != "weight_decay" or len(set(values)) > 1:
      shown = ("" if value is None else _short(value) for value in values)
      columns[field.replace("_", " ")] = shown
  if any(row.get("on_edge") for row in rows):
    edges = (", ".join(row.get("on_edge", ())) for row in rows)
    columns["at the end of its values"] = edges
  accuracies = {name: row["test_accuracy"] for name, row in results.items()}
  columns["test accuracy (%)"] = map(accuracy, accuracies.values())
  for other in others:
    columns[f"over {other}"] = [
      over(own, accuracies[other])
      if name != other and other in accuracies
      else ""
      for name, own in accuracies.items()
    ]
  cells = zip(*columns.values(), strict=True)
  return {"header": list(columns), "rows": [list(row) for row in cells]}


def by_setting(
  what: str, results: Mapping[Any, Mapping[str, Row]]
) -> dict[str, Any]:
  """What the JSON holds of arms over a setting, F-SAM paired with the rest."""
  settings, arms = list(results), list(next(iter(results.values())))
  others = [name for name in reversed(arms) if name != "F-SAM"]
  points = []
  for setting, rows in results.items():
    for name, row in rows.items():
      fields = ("learning_rate", "rho", "weight_decay")
      cells = ["-" if row[x] is None else _short(row[x]) for x in fields]
      ends = ", ".join(row.get("on_edge", ()))
      points.append([setting, name, *cells, len(row.get("grid", ())), ends])
  of = lambda name: [
    figures.gaps(results[x][name]["test_accuracy"]) for x in results
  ]
  differences = [
    line(
      f"F-SAM over {name}",
      settings,
      [a - b for a, b in zip(of("F-SAM"), of(name), strict=True)],
    )
    for name in others
  ]
  header = ["learning rate", "rho", "weight decay", "points tried"]
  return {
    "results": {
      x if isinstance(x, str) else f"{x:g}": rows for x, rows in results.items()
    },
    "tables": [
      {
        "header": [what, *arms, *(f"F-SAM over {name}" for name in others)],
        "rows": [
          [
            setting,
            *(accuracy(rows[name]["test_accuracy"]) for name in arms),
            *(_difference(rows["F-SAM"], rows[name]) for name in others),
          ]
          for setting, rows in results.items()
        ],
      },
      {
        "header": [what, "", *header, "at the end of its values"],
        "rows": points,
      },
    ],
    "panels": [
      panel(what, [line(name, settings, of(name)) for name in arms]),
      panel(what, differences, "paired difference (points)"),
    ],
  }


def _difference(first: Row, second: Row) -> dict[str, Any]:
  """A paired difference with its median, and the error that the search adds."""
  pair = statistics.paired(first["test_accuracy"], second["test_accuracy"])
  cell: dict[str, Any] = {"difference": pair["mean"]}
  cell["error"] = pair["standard_error"]
  if pair["mean"] is None:
    return cell
  if "candidates" in first and "candidates" in second:
    tested = (_tested(first), _tested(second))
    cell["search_error"] = search.error_with_search(*tested)
  return cell | {"median": pair["median"]}


def _tested(row: Row) -> search.Tested:
  """The candidates of an arm."""
  columns = ("validation_accuracy", "test_accuracy")
  return search.Tested(
    *(
      figures.gaps([x[column] for x in row["candidates"]]) for column in columns
    )
  )


def _short(value: float) -> float:
  return float(f"{value:.3g}")


def line(label: str, x: Iterable[Any], columns: Any) -> dict[str, Any]:
  """A line of a figure, with a gap where a value is not finite."""
  pairs = [
    statistics.mean_and_error(values)
    if np.all(np.isfinite(figures.gaps(values)))
    else (None, None)
    for values in columns
  ]
  return {
    "label": label,
    "x": list(x),
    "mean": [mean for mean, _ in pairs],
    "error": [error for _, error in pairs],
  }


def panel(
  xlabel: str,
  lines: list[dict[str, Any]],
  ylabel: str = "test accuracy (%)",
  **look: Any,
) -> dict[str, Any]:
  """A panel of a figure.

  Args:
    xlabel: what the lines go over.
    lines: its lines.
    ylabel: what they show.
    **look: its ``title``, its ``ylim``, and whether the axes are logarithmic,
      ``is_log`` and ``is_log_y``.
  """
  return {"xlabel": xlabel, "ylabel": ylabel, "series": lines, **look}


def bars(results: Mapping[str, Row]) -> dict[str, Any]:
  """A panel of the arms' test accuracies side by side."""
  values = [row["test_accuracy"] for row in results.values()]
  return panel("", [line("", results, values)])


def title_of(config: Mapping[str, Any]) -> str:
  """What was trained on what, for the head of a figure or of the tables."""
  noise = config["label_noise"]
  shown = f"label noise {noise:g}, " if isinstance(noise, float) else ""
  seeds = len(config["seeds"])
  return (
    f"{pathlib.Path(config['dataset']).name}, {config['model']}, {shown}"
    f"{seeds} seed{'s' if seeds > 1 else ''}"
  )


def publish(
  result: Mapping[str, Any],
  name: str,
  directory: pathlib.Path,
  title: str = "",
  panels: Sequence[Mapping[str, Any]] = (),
) -> None:
  """Prints the tables of a result, then writes NAME.json and a figure.

  Args:
    result: what the JSON holds, ``"tables"`` among it.
    name: of the files.
    directory: to write them to.
    title: of the figure.
    panels: of the figure; none where there are none.
  """
  for table in result["tables"]:
    print(f"\n{tables.text(table)}", flush=True)
  paths = [directory / f"{name}.json"]
  with files.saving(directory):
    files.write_json(result, paths[0])
    if panels:
      paths.append(directory / f"{name}.png")
      draw(title, panels, paths[1])
  print("\nwrote", " and ".join(map(str, paths)))


def draw(
  title: str, panels: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> None:
  """Draws panels, four in a row, a gap where a value is missing."""
  columns, lines = min(4, len(panels)), -(-len(panels) // 4)
  drawing = figures.new(max(5.4, 3.6 * columns), 3.6 * max(1, lines))
  for i, shown in enumerate(panels):
    _draw_panel(drawing.add_subplot(lines, columns, i + 1), shown)
  drawing.suptitle(f"{title}, mean ± standard error", fontsize="medium")
  figures.save(drawing, path)


def _draw_panel(axes: Any, shown: Mapping[str, Any]) -> None:
  for series in shown["series"]:
    mean, error = map(figures.gaps, (series["mean"], series["error"]))
    x = series["x"]
    color = series.get("color")
    if isinstance(x[0], str):
      label = series["label"]
      axes.errorbar(range(len(x)), mean, error, fmt="o", capsize=3, label=label)
      axes.set_xticks(range(len(x)), x, rotation=60, ha="right")
    elif series.get("is_points"):
      axes.errorbar(x, mean, error, fmt=".", color=color, zorder=0)
    else:
      figures.band(axes, x, mean, error, label=series["label"], color=color)
    for name, *at in zip(series.get("names", ()), x, mean, strict=False):
      axes.annotate(name, at, rotation=15, fontsize="xx-small")
  if shown.get("is_log"):
    axes.set_xscale("log")
  if shown.get("is_log_y"):
    axes.set_yscale("log")
  if "ylim" in shown:
    axes.set_ylim(*shown["ylim"])
  axes.set_xlabel(shown["xlabel"])
  axes.set_ylabel(shown["ylabel"], fontsize="small")
  axes.set_title(shown.get("title", ""), fontsize="medium")
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="x-small")

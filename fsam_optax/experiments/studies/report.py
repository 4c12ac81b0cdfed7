"""Cells, lines, tables and the figure of a study."""

from collections.abc import Iterable
from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from fsam_optax.experiments.common import figures
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables


def over(first: Any, second: Any) -> str:
  """A paired difference as a table prints it.

  Args:
    first: one value a seed, NaN where its run diverged.
    second: as many, of what it is compared with.

  Returns:
    Mean ± standard error and p, or a dash.
  """
  found = statistics.paired(first, second)
  mean, p_value = found["mean"], found["p_value"]
  if mean is None:
    return "-"
  text = tables.with_error(mean, found["standard_error"], signed=True)
  return text if p_value is None else f"{text}, p {p_value:.1g}"


def accuracy(values: Any) -> str:
  """Mean ± standard error in percent, and how many runs it leaves out."""
  mean, error = statistics.mean_and_error(values)
  diverged = int(np.sum(~np.isfinite(np.asarray(values, np.float64))))
  text = "-" if mean is None else tables.with_error(mean, error)
  return f"{text} ({diverged} diverged)" if diverged else text


def number(values: Any, digits: int = 3) -> str:
  """Mean ± standard error, or a dash where nothing is finite."""
  mean, error = statistics.mean_and_error(values)
  if mean is None:
    return "-"
  text = f"{mean:.{digits}g}"
  if error is None:
    return text
  return f"{text} ± " + (f"{error:.0f}" if error >= 10 else f"{error:.1g}")


def star(result: dict[str, Any]) -> str:
  """Marks a best point at the end of its grid."""
  return "*" if result["on_edge"] else ""


def line(label: str, x: Iterable[Any], columns: Any) -> dict[str, Any]:
  """A line of a figure, with a gap where a value is not finite.

  Args:
    label: its name.
    x: where its points stand.
    columns: the values at each.

  Returns:
    What a panel holds.
  """
  pairs = [
    statistics.mean_and_error(values)
    if np.all(np.isfinite(values))
    else (None, None)
    for values in columns
  ]
  return {
    "label": label,
    "x": list(x),
    "mean": [mean for mean, _ in pairs],
    "error": [error for _, error in pairs],
  }


def panel(xlabel: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
  """A panel of test accuracy."""
  return {"xlabel": xlabel, "ylabel": "test accuracy (%)", "series": lines}


def by_setting(
  what: str,
  settings: Sequence[float],
  results: dict[str, Any],
  arms: Iterable[str],
) -> dict[str, Any]:
  """A table and a panel of the arms over a setting, F-SAM paired with SAM.

  Args:
    what: is set.
    settings: its values.
    results: by value, as ``:g`` writes it, and by arm.
    arms: their names.

  Returns:
    What the JSON holds.
  """
  arms = list(arms)
  rows = []
  for setting in settings:
    of = results[f"{setting:g}"]
    rows.append(
      [
        f"{setting:g}",
        *(_accuracy_at_best(of[name]) for name in arms),
        over(of["F-SAM"]["test_accuracy"], of["SAM"]["test_accuracy"]),
      ]
    )
  lines = [
    line(
      name,
      settings,
      [results[f"{s:g}"][name]["test_accuracy"] for s in settings],
    )
    for name in arms
  ]
  return {
    "results": results,
    "tables": [{"header": [what, *arms, "F-SAM over SAM"], "rows": rows}],
    "panels": [panel(what, lines)],
  }


def _accuracy_at_best(result: dict[str, Any]) -> str:
  radius = "" if result["rho"] is None else f", rho {result['rho']:g}"
  return (
    f"{accuracy(result['test_accuracy'])} (rate "
    f"{result['learning_rate']:.3g}{radius}){star(result)}"
  )


def noise_of(config: dict[str, Any]) -> str:
  """The label noise of a study as prose writes it, empty where it varies."""
  noise = config["label_noise"]
  return f"label noise {noise:g}, " if isinstance(noise, float) else ""


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
  """Draws the panels of a study, a gap where a value is missing.

  Args:
    result: what the JSON of ``study`` holds.
    path: the PNG to write.
  """
  panels, config = result["panels"], result["config"]
  drawing = figures.new(max(5.0, 3.6 * len(panels)), 3.4)
  for i, shown in enumerate(panels):
    _draw_panel(drawing.add_subplot(1, len(panels), i + 1), shown)
  drawing.suptitle(
    f"{result['study']}: {pathlib.Path(config['dataset']).name}, "
    f"{config['model']}, {noise_of(config)}{len(config['seeds'])} seeds, mean "
    "± standard error",
    fontsize="small",
  )
  figures.save(drawing, path)


def _draw_panel(axes: Any, shown: dict[str, Any]) -> None:
  for series in shown["series"]:
    mean, error = map(figures.gaps, (series["mean"], series["error"]))
    x = series["x"]
    if isinstance(x[0], str):
      axes.errorbar(range(len(x)), mean, error, fmt="o", capsize=3)
      axes.set_xticks(range(len(x)), x, rotation=60, ha="right")
    else:
      figures.band(axes, x, mean, error, label=series["label"])
  if shown.get("is_log"):
    axes.set_xscale("log")
  if shown.get("is_log_y"):
    axes.set_yscale("log")
  axes.set_xlabel(shown["xlabel"])
  axes.set_ylabel(shown["ylabel"], fontsize="small")
  axes.set_title(shown.get("title", ""), fontsize="medium")
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="x-small")

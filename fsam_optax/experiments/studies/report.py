"""Cells, lines, tables and the figure of a study."""

from collections.abc import Iterable
from collections.abc import Sequence
import pathlib
from typing import Any

import numpy as np

from fsam_optax.experiments.common import figures
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.seeds import search


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
  """Mean ± standard error in percent, and what a mean alone would hide.

  That is how many runs diverged, which it leaves out, and where some collapsed
  how many, and the median.
  """
  mean, error = statistics.mean_and_error(values)
  values = np.asarray(values, np.float64)
  diverged = int(np.sum(~np.isfinite(values)))
  text = "-" if mean is None else tables.with_error(mean, error)
  if collapsed := statistics.collapsed(values):
    median = np.median(values[np.isfinite(values)])
    text += f" (median {median:.2f}, {collapsed} collapsed)"
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
  """Tables and a panel of the arms over a setting, F-SAM paired with them.

  Args:
    what: is set.
    settings: its values.
    results: by value, as ``:g`` writes it, and by arm, F-SAM among them.
    arms: their names.

  Returns:
    What the JSON holds.
  """
  arms = list(arms)
  others = [name for name in reversed(arms) if name != "F-SAM"]
  accuracies, points = [], []
  for setting in settings:
    found = results[f"{setting:g}"]
    accuracies.append(
      [
        f"{setting:g}",
        *(accuracy(found[name]["test_accuracy"]) for name in arms),
        *(_difference(found["F-SAM"], found[name]) for name in others),
      ]
    )
    points += [[f"{setting:g}", name, *_point(found[name])] for name in arms]
  of = lambda name, setting: np.array(
    results[f"{setting:g}"][name]["test_accuracy"], np.float64
  )
  lines = [
    line(name, settings, [of(name, s) for s in settings]) for name in arms
  ]
  differences = [
    line(
      f"F-SAM over {name}",
      settings,
      [of("F-SAM", setting) - of(name, setting) for setting in settings],
    )
    for name in others
  ]
  header = ["learning rate", "rho", "weight decay", "points tried"]
  return {
    "results": results,
    "tables": [
      {
        "header": [what, *arms, *(f"F-SAM over {name}" for name in others)],
        "rows": accuracies,
      },
      {
        "header": [what, "", *header, "at the end of its values"],
        "rows": points,
      },
    ],
    "panels": [
      panel(what, lines),
      panel(what, differences) | {"ylabel": "paired difference (points)"},
    ],
  }


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
  """A paired difference with its median, and the error that the search adds."""
  values = first["test_accuracy"], second["test_accuracy"]
  pair = statistics.paired(*values)
  if pair["mean"] is None or pair["median"] is None:
    return "-"
  text = tables.with_error(pair["mean"], pair["standard_error"], signed=True)
  if "candidates" in first and "candidates" in second:
    error = search.error_with_search(_tested(first), _tested(second))
    text += f" (± {error:.2f} with the search)"
  return f"{text}, median {pair['median']:+.2f}"


def _tested(result: dict[str, Any]) -> search.Tested:
  """The candidates of an arm, from what the JSON says."""
  columns = ("validation_accuracy", "test_accuracy")
  return search.Tested(
    *(
      np.array([x[column] for x in result["candidates"]], np.float64)
      for column in columns
    )
  )


def _point(result: dict[str, Any]) -> list[str]:
  rho = "-" if result["rho"] is None else f"{result['rho']:.3g}"
  return [
    f"{result['learning_rate']:.3g}",
    rho,
    f"{result['weight_decay']:.3g}",
    str(len(result["grid"])),
    ", ".join(result["on_edge"]),
  ]


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

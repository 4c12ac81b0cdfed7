"""Figures: panels of lines with their errors, as a JSON holds and a PNG shows.

A panel is ``{"series": [...]}`` with what :meth:`matplotlib.axes.Axes.set`
takes. A series has a ``label``, and as lists its ``x``, ``mean`` and ``error``,
None where a value is missing.
"""

import pathlib
from typing import Any, Iterable, Mapping, Sequence

from matplotlib.figure import Figure
import numpy as np

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import statistics


def line(label: str, x: Iterable[Any], columns: Any) -> dict[str, Any]:
  """Mean and error of the values at each ``x``, a gap if one is not finite."""
  pairs = [
    statistics.mean_and_error(values)
    if np.all(np.isfinite(np.asarray(values, float)))
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
  """A panel of lines."""
  return {"xlabel": xlabel, "ylabel": ylabel, "series": lines, **look}


def draw(
  title: str, panels: Sequence[Mapping[str, Any]], path: pathlib.Path
) -> None:
  """Writes a PNG of panels, four in a row, or two whose ``x`` are names."""
  most, width = (2, 6.4) if isinstance(_first_x(panels[0]), str) else (4, 3.6)
  columns, rows = min(most, len(panels)), -(-len(panels) // most)
  # No pyplot: it would choose a window system and keep the figure.
  size = (max(5.4, width * columns), 3.6 * rows)
  figure = Figure(size, layout="constrained")
  for i, shown in enumerate(panels):
    _draw_panel(figure.add_subplot(rows, columns, i + 1), shown)
  figure.suptitle(f"{title}, mean ± standard error", fontsize="medium")
  files.write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _first_x(shown: Mapping[str, Any]) -> Any:
  return shown["series"][0]["x"][0]


def _draw_panel(axes: Any, shown: Mapping[str, Any]) -> None:
  look = {what: shown[what] for what in shown if what != "series"}
  if isinstance(_first_x(shown), str):  # Names are read from top to bottom.
    look |= {"xlabel": shown["ylabel"], "ylabel": shown["xlabel"]}
    axes.invert_yaxis()
  for series in shown["series"]:
    x, label = series["x"], series["label"]
    mean, error = (np.asarray(series[k], float) for k in ("mean", "error"))
    if isinstance(x[0], str):
      place = range(len(x))
      axes.errorbar(mean, place, xerr=error, fmt="o", capsize=3, label=label)
      axes.set_yticks(place, x)
      continue
    # Few points are to be seen as such, and a single one makes no line.
    marker = "." if len(x) < 30 else None
    (drawn,) = axes.plot(x, mean, marker=marker, label=label)
    band = {"color": drawn.get_color(), "alpha": 0.25, "linewidth": 0}
    axes.fill_between(x, mean - error, mean + error, **band)
  axes.set(**look)
  axes.grid(alpha=0.3)
  if axes.get_legend_handles_labels()[0]:
    axes.legend(fontsize="x-small")

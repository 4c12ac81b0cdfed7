"""Figures: a drawing without a window, bands of error, a PNG that is whole."""

import pathlib
from typing import Any, Optional

import numpy as np

from fsam_optax.experiments.common import files


def new(width: float, height: float) -> Any:
  """An empty drawing, in inches."""
  # No pyplot: it would choose a window system and keep the figure.
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout="constrained")


def band(
  axes: Any,
  x: Any,
  mean: Any,
  error: Any,
  *,
  label: str = "",
  color: Optional[str] = None,
) -> None:
  """Draws a line in a band of one standard error to both sides.

  Args:
    axes: to draw on.
    x: where the points stand.
    mean: the line, a gap where it is NaN.
    error: half the height of the band, none where it is NaN.
    label: for the legend.
    color: of both; None for the next one.
  """
  mean, error = np.asarray(mean), np.asarray(error)
  # Few points are to be seen as such, and a single one makes no line.
  marker = "." if len(x) < 30 else None
  (line,) = axes.plot(x, mean, marker=marker, label=label, color=color)
  axes.fill_between(
    x,
    mean - error,
    mean + error,
    color=line.get_color(),
    alpha=0.25,
    linewidth=0,
  )


def gaps(values: Any) -> np.ndarray:
  """The values in float64, NaN for None."""
  return np.asarray(values, np.float64)


def save(drawing: Any, path: pathlib.Path, *, dpi: int = 120) -> None:
  """Writes a PNG, whole or not at all."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg

  FigureCanvasAgg(drawing)
  files.write(path, lambda file: drawing.savefig(file, format="png", dpi=dpi))

"""The report: statistics, tables, figure, JSON and the progress bar."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import os
import pathlib
import sys
import tempfile
from typing import Any, Callable, Optional

import numpy as np

_COLOURS = {"sgd": "#7f7f7f", "sam": "#0072b2", "fsam": "#d55e00"}
_LABELS = {"sgd": "SGD", "sam": "SAM", "fsam": "F-SAM"}
_PAIRS = (("fsam", "sam"), ("sam", "sgd"), ("fsam", "sgd"))


def standard_error(values: np.ndarray) -> Optional[float]:
  """Standard error of the mean; None for fewer than two values."""
  if len(values) < 2:
    return None
  return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def paired(accuracy: dict[str, np.ndarray]) -> dict[str, dict[str, Any]]:
  """Differences between optimizers over the same seeds.

  Args:
    accuracy: one value a seed for each optimizer, in the same order of seeds.

  Returns:
    For F-SAM against SAM and each against SGD, where both ran: ``mean`` of the
    differences, their ``standard_error`` and the two-sided ``p_value`` of the
    paired t-test. The last two are None where they are not defined, for one
    seed or where all differences are equal.
  """
  from scipy import stats

  result = {}
  for first, second in _PAIRS:
    if first not in accuracy or second not in accuracy:
      continue
    difference = accuracy[first] - accuracy[second]
    error = standard_error(difference)
    # Equal differences have an error of 0, or of a rounding.
    is_defined = error is not None and np.ptp(difference) > 1e-9
    result[f"{first}-{second}"] = {
      "mean": float(np.mean(difference)),
      "standard_error": error,
      "p_value": (
        float(stats.ttest_rel(accuracy[first], accuracy[second]).pvalue)
        if is_defined
        else None
      ),
    }
  return result


def with_error(
  mean: float, error: Optional[float], *, signed: bool = False
) -> str:
  """Formats a mean with its standard error.

  Examples:
    >>> with_error(80.123, 0.161), with_error(0.5, None, signed=True)
    ('80.12 ± 0.16', '+0.50 ± n/a')
  """
  number = f"{mean:+.2f}" if signed else f"{mean:.2f}"
  return f"{number} ± " + ("n/a" if error is None else f"{error:.2f}")


def label(optimizer: str) -> str:
  """The name of an optimizer as prose writes it."""
  return _LABELS[optimizer]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Aligns columns, the first to the left and the others to the right.

  Examples:
    >>> print(table(["name", "value"], [["a", "1.0"], ["bcdef", "10.0"]]))
    name   value
    a        1.0
    bcdef   10.0
  """
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def result_tables(report: dict[str, Any]) -> str:
  """The tables of ``compare``, from what its JSON holds."""
  results = report["results"]
  rows = []
  for name, result in results.items():
    accuracy = np.array(result["test_accuracy"])
    diverged = len(result["diverged_seeds"])
    rows.append(
      [
        _LABELS[name],
        f"{result['learning_rate']:g}",
        "-" if result["rho"] is None else f"{result['rho']:g}",
        with_error(accuracy.mean(), standard_error(accuracy)),
        f"{diverged} of {len(accuracy)}",
        f"{result['seconds']:.1f}",
        f"{result['compile_seconds']:.1f}",
      ]
    )
  parts = [
    table(
      [
        "",
        "learning rate",
        "rho",
        "test accuracy %",
        "diverged",
        "seconds",
        "compiling",
      ],
      rows,
    )
  ]
  rows = [
    [
      " over ".join(_LABELS[part] for part in name.split("-")),
      with_error(pair["mean"], pair["standard_error"], signed=True),
      "n/a" if pair["p_value"] is None else f"{pair['p_value']:.2g}",
    ]
    for name, pair in report["paired"].items()
  ]
  if rows:
    parts.append(table(["paired over seeds", "difference", "p"], rows))
  return "\n\n".join(parts)


def figure(report: dict[str, Any], path: pathlib.Path) -> None:
  """Draws validation accuracy over training, one line an optimizer.

  Args:
    report: what the JSON of ``compare`` holds.
    path: the PNG to write.
  """
  # No pyplot: it would choose a window system and keep the figure.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.ticker import MaxNLocator

  config = report["config"]
  drawing = Figure(figsize=(6.4, 4.0), layout="constrained")
  axes = drawing.add_subplot()
  epochs = np.arange(1, config["epochs"] + 1)
  for name, result in report["results"].items():
    curve = np.array(result["curve"])
    error = np.array(
      [np.nan if e is None else e for e in result["curve_standard_error"]]
    )
    rho = "" if result["rho"] is None else f", rho {result['rho']:g}"
    axes.plot(
      epochs,
      curve,
      color=_COLOURS[name],
      label=f"{_LABELS[name]}: learning rate {result['learning_rate']:g}{rho}",
      marker="." if len(epochs) == 1 else None,
    )
    axes.fill_between(
      epochs,
      curve - error,
      curve + error,
      color=_COLOURS[name],
      alpha=0.25,
      linewidth=0,
    )
  seeds = len(config["seeds"])
  axes.set_xlabel("epoch")
  axes.xaxis.set_major_locator(MaxNLocator(integer=True))
  axes.set_ylabel("validation accuracy (%)")
  axes.set_title(
    f"{pathlib.Path(config['dataset']).name}, {config['model']}, label noise "
    f"{config['label_noise']:g}: mean ± standard error, {seeds} "
    f"seed{'s' if seeds > 1 else ''}",
    fontsize="medium",
  )
  axes.grid(alpha=0.3)
  axes.legend(loc="best")
  FigureCanvasAgg(drawing)
  write_file(path, lambda file: drawing.savefig(file, format="png", dpi=150))


def noise_of(config: dict[str, Any]) -> str:
  """The label noise of a study as prose writes it, empty where it varies."""
  noise = config["label_noise"]
  return f"label noise {noise:g}, " if isinstance(noise, float) else ""


def study_figure(result: dict[str, Any], path: pathlib.Path) -> None:
  """Draws the panels of a study, a gap where a value is missing.

  Args:
    result: what the JSON of ``study`` holds.
    path: the PNG to write.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  panels = result["panels"]
  drawing = Figure(
    figsize=(max(5.0, 3.6 * len(panels)), 3.4), layout="constrained"
  )
  as_array = lambda values: np.array(
    [np.nan if value is None else value for value in values], np.float64
  )
  for i, panel in enumerate(panels):
    axes = drawing.add_subplot(1, len(panels), i + 1)
    for series in panel["series"]:
      mean, error = as_array(series["mean"]), as_array(series["error"])
      x = series["x"]
      if isinstance(x[0], str):
        axes.errorbar(range(len(x)), mean, error, fmt="o", capsize=3)
        axes.set_xticks(range(len(x)), x, rotation=60, ha="right")
        continue
      marker = "." if len(x) < 30 else None
      (line,) = axes.plot(x, mean, marker=marker, label=series["label"])
      axes.fill_between(
        x,
        mean - error,
        mean + error,
        color=line.get_color(),
        alpha=0.25,
        linewidth=0,
      )
    if panel.get("is_log"):
      axes.set_xscale("log")
    if panel.get("is_log_y"):
      axes.set_yscale("log")
    axes.set_xlabel(panel["xlabel"])
    axes.set_ylabel(panel["ylabel"], fontsize="small")
    axes.set_title(panel.get("title", ""), fontsize="medium")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(fontsize="x-small")
  config = result["config"]
  drawing.suptitle(
    f"{result['study']}: {pathlib.Path(config['dataset']).name}, "
    f"{config['model']}, {noise_of(config)}{len(config['seeds'])} seeds, mean "
    "± standard error",
    fontsize="small",
  )
  FigureCanvasAgg(drawing)
  write_file(path, lambda file: drawing.savefig(file, format="png", dpi=120))


def write_json(report: dict[str, Any], path: pathlib.Path) -> None:
  """Writes strict JSON, whole or not at all."""
  text = json.dumps(report, indent=1, allow_nan=False) + "\n"
  write_file(path, lambda file: file.write(text.encode()))


def write_file(path: pathlib.Path, write: Callable[[Any], object]) -> None:
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
  try:
    with os.fdopen(handle, "wb") as file:
      write(file)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp keeps it to its owner.
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int], Callable[[], None]]]:
  """Shows progress bars where stdout is a terminal, and nothing elsewhere.

  Yields:
    A function of a title and a number of steps. It opens a bar and returns the
    function that moves it by one step.
  """
  if not sys.stdout.isatty():
    yield lambda title, total: lambda: None
    return
  from rich import progress as rich_progress

  with rich_progress.Progress(
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeElapsedColumn(),
  ) as bars:

    def start(title: str, total: int) -> Callable[[], None]:
      task = bars.add_task(title, total=total)
      return lambda: bars.advance(task)

    yield start

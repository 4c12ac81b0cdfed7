"""What ``train`` shows and writes: lines, a bar, a table and the curves."""

import importlib.metadata
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from fsam_optax.experiments import report
from fsam_optax.experiments.paper_recipes import Config


class Writer:
  """Writes the metrics of a run, and shows them as it goes.

  Where stdout is a terminal it shows a bar, and elsewhere a line an epoch.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    journal: Any,
    tensorboard: bool,
    *,
    total: int,
    done: int,
    rows: int,
  ) -> None:
    """Opens what is written to.

    Args:
      folder: of the run.
      journal: gets the lines; None where another process writes.
      tensorboard: whether to write for TensorBoard.
      total: number of batches of the whole run.
      done: number of batches that were taken before.
      rows: of a batch.
    """
    self._journal, self._rows = journal, rows
    self._board = self._bar = None
    if journal is None:
      return
    if tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=done + 1
      )
    if sys.stdout.isatty():
      self._bar, self._task = _bar(total, done)

  def __enter__(self) -> "Writer":
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(self, *exception) -> None:
    if self._bar is not None:
      self._bar.stop()
    if self._board is not None:
      self._board.close()

  def step(self, line: dict[str, Any]) -> None:
    """The metrics of one step."""
    if self._journal is None:
      return
    self._journal.append(line)
    self._scalars("step", line)
    self._move(line)

  def epoch(self, line: dict[str, Any]) -> None:
    """The means of an epoch, and its evaluation."""
    if self._journal is None:
      return
    self._journal.append(line)
    self._scalars("epoch", line)
    self._move(line)
    if self._bar is not None:
      self._bar.print(epoch_line(line))
    else:
      print(epoch_line(line), flush=True)

  def _move(self, line: dict[str, Any]) -> None:
    if self._bar is None:
      return
    # Of the last steps, as the time that is left is.
    speed = self._bar.tasks[self._task].speed
    rate = "" if speed is None else f"{speed * self._rows:,.0f} images/s"
    self._bar.update(
      self._task, completed=line["batches"], shown=_shown(line), rate=rate
    )

  def _scalars(self, kind: str, line: dict[str, Any]) -> None:
    if self._board is None:
      return
    for name, value in line.items():
      if isinstance(value, (int, float)) and name != "batches":
        self._board.add_scalar(f"{kind}/{name}", value, line["batches"])


def _bar(total: int, done: int) -> tuple[Any, Any]:
  from rich import progress

  bar = progress.Progress(
    progress.BarColumn(),
    progress.MofNCompleteColumn(),
    progress.TextColumn("{task.fields[shown]}"),
    progress.TextColumn("{task.fields[rate]}"),
    progress.TimeRemainingColumn(),
  )
  return bar, bar.add_task("", total=total, completed=done, shown="", rate="")


def _shown(line: dict[str, Any]) -> str:
  number = lambda name, form: (
    "n/a" if line[name] is None else format(line[name], form)
  )
  return (
    f"epoch {line['epoch']:.1f}  loss {number('loss', '.3f')}  accuracy "
    f"{number('accuracy', '.1f')} %  sharpness {number('sharpness', '.3f')}"
  )


def epoch_line(line: dict[str, Any]) -> str:
  """One line for a log, on an epoch."""
  evaluated = next(k for k in line if k.endswith("_accuracy"))
  text = (
    f"{_shown(line)}  {evaluated.replace('_', ' ')} {line[evaluated]:.2f} %  "
    f"{line['images_per_second']:,.0f} images/s, "
    f"{line['waiting_share']:.1%} of the time waiting for data"
  )
  if line["skipped"]:
    text += f"  skipped {line['skipped']} steps that were not finite"
  return text


def summary(
  recipe: str, config: Config, results: dict[int, list[dict[str, Any]]]
) -> dict[str, Any]:
  """The outcome over the seeds, as its JSON holds it.

  Args:
    recipe: its name.
    config: the configuration.
    results: one line an epoch, for each seed.

  Returns:
    The evaluated accuracy after the last epoch of each seed, in percent, their
    mean and its standard error, and which epoch was the best of each.
  """
  first = next(iter(results.values()))
  name = next(k for k in first[-1] if k.endswith("_accuracy"))
  final = np.array([lines[-1][name] for lines in results.values()])
  return {
    "recipe": recipe,
    "config": config._asdict(),
    "evaluated": name.removesuffix("_accuracy"),
    "seeds": list(results),
    "final_accuracy": final.tolist(),
    "mean": float(final.mean()),
    "standard_error": report.standard_error(final),
    "best_epoch": [
      max(lines, key=lambda line: (line[name], line["epoch"]))["epoch"]
      for lines in results.values()
    ],
    "versions": {
      package: importlib.metadata.version(package)
      for package in ("fsam-optax", "jax", "optax", "flax")
    },
    "device": jax.devices()[0].device_kind,
  }


def table(found: dict[str, Any]) -> str:
  """The outcome for a terminal."""
  rows = [
    [str(seed), f"{accuracy:.2f}", str(epoch)]
    for seed, accuracy, epoch in zip(
      found["seeds"], found["final_accuracy"], found["best_epoch"], strict=True
    )
  ]
  rows.append(
    ["mean", report.with_error(found["mean"], found["standard_error"]), ""]
  )
  text = report.table(
    ["seed", f"{found['evaluated']} accuracy %, last epoch", "best epoch"], rows
  )
  if found["evaluated"] == "test":
    text += (
      "\n\nThe best epoch is that of the test accuracy: a result is the last "
      "one's. --validation holds rows out to choose by."
    )
  return text


def write(
  found: dict[str, Any],
  results: dict[int, list[dict[str, Any]]],
  folder: pathlib.Path,
) -> None:
  """Writes ``summary.json`` and ``curves.png``."""
  report.write_json(found, folder / "summary.json")
  _curves(found, results, folder / "curves.png")


def _curves(
  found: dict[str, Any],
  results: dict[int, list[dict[str, Any]]],
  path: pathlib.Path,
) -> None:
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  config, evaluated = found["config"], found["evaluated"]
  panels: list[tuple[str, dict[str, str]]] = [
    (
      "accuracy (%)",
      {"training": "accuracy", evaluated: f"{evaluated}_accuracy"},
    ),
    ("loss", {"training": "loss", evaluated: f"{evaluated}_loss"}),
    ("sharpness", {"training": "sharpness"}),
  ]
  drawing = Figure(figsize=(10.8, 3.4), layout="constrained")
  for i, (label, series) in enumerate(panels):
    axes = drawing.add_subplot(1, len(panels), i + 1)
    for name, field in series.items():
      values = np.array(
        [
          [np.nan if line[field] is None else line[field] for line in lines]
          for lines in results.values()
        ]
      )
      epochs = np.arange(1, values.shape[1] + 1)
      mean = values.mean(0)
      marker = "." if len(epochs) < 30 else None
      (drawn,) = axes.plot(epochs, mean, marker=marker, label=name)
      if len(values) > 1:
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        axes.fill_between(
          epochs,
          mean - error,
          mean + error,
          color=drawn.get_color(),
          alpha=0.25,
          linewidth=0,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
  seeds = len(found["seeds"])
  drawing.suptitle(
    f"{found['recipe']}, {report.label(config['optimizer'])}: {seeds} seed"
    + ("s, mean ± standard error" if seeds > 1 else ""),
    fontsize="small",
  )
  FigureCanvasAgg(drawing)
  report.write_file(
    path, lambda file: drawing.savefig(file, format="png", dpi=120)
  )

"""The metrics of a seed: to a file of lines, TensorBoard and the terminal."""

import contextlib
import json
import math
import pathlib
from typing import Any

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.train import job
from fsam_optax.experiments.train.run_folder import RunError
from fsam_optax.experiments.train.run_folder import writing

_FILE = "metrics.jsonl"


class Journal:
  """Writes the metrics of a seed, and shows them; a context.

  Each is a line of JSON with the number of ``batches`` before it. A terminal
  shows a bar besides. Only the first process writes.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    epochs: list[dict[str, Any]],
    *,
    tensorboard: bool,
    title: str,
    total: int,
    done: int,
  ) -> None:
    """Opens the files, after ``done`` of ``total`` batches.

    Lines on steps up to there stay; those on epochs are the checkpoint's.
    """
    self._path, self._board = folder / _FILE, None
    self._bars = progress.Bars()
    if not job.is_first():
      return
    with writing(self._path):
      folder.mkdir(parents=True, exist_ok=True)
      lines = [*_lines(self._path, "step", done), *epochs]
      # A step is written before the epoch that it ends.
      lines.sort(key=lambda line: (line["batches"], line["kind"] == "epoch"))
      text = "".join(map(_as_line, lines))
      files.write(self._path, lambda file: file.write(text.encode()))
    if tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=done + 1
      )
    self._bar = self._bars.add_task(title, total=total, completed=done, text="")

  def __enter__(self) -> "Journal":
    self._bars.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._bars.stop()
    if self._board is not None:
      self._board.close()

  def write(self, line: dict[str, Any]) -> None:
    """Writes the metrics of one step, or the means of an epoch."""
    if not job.is_first():
      return
    with writing(self._path), self._path.open("a") as file:
      file.write(_as_line(line))
    self._bars.update(
      self._bar, completed=line["batches"], text=short_line(line)
    )
    if line["kind"] == "epoch":
      print(epoch_line(line), flush=True)  # Above the bar.
    if self._board is not None:
      for name, value in line.items():
        if isinstance(value, (int, float)) and name != "batches":
          tag = f"{line['kind']}/{name}"
          self._board.add_scalar(tag, value, line["batches"])


def check_new(folder: pathlib.Path) -> None:
  """Raises a RunError where a seed has lost its checkpoints."""
  epochs = len(_lines(folder / _FILE, "epoch", math.inf))
  if epochs > 2:  # The checkpoint of the first was whole before the third.
    raise RunError(
      f"the checkpoints in {str(folder)!r} must be there, for {epochs} epochs "
      "are in its metrics. Put them back, or, to train the seed anew, take the "
      "folder away"
    )


def _lines(
  path: pathlib.Path, kind: str, batches: float
) -> list[dict[str, Any]]:
  """The whole lines of a kind, up to a number of batches."""
  found = []
  text = path.read_text(errors="replace") if path.is_file() else ""
  for part in text.splitlines():
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
      line = json.loads(part)
      if line["kind"] == kind and line["batches"] <= batches:
        found.append(line)
  return found


def _as_line(line: dict[str, Any]) -> str:
  return json.dumps(line, allow_nan=False) + "\n"


def short_line(line: dict[str, Any]) -> str:
  numbers = {k: math.nan if x is None else x for k, x in line.items()}
  return (
    "epoch {epoch:.1f}  loss {loss:.3f}  accuracy {accuracy:.1f} %  "
    "sharpness {sharpness:.3f}".format(**numbers)
  )


def epoch_line(line: dict[str, Any]) -> str:
  evaluated = next(k for k in line if k.endswith("_accuracy"))
  text = (
    f"{short_line(line)}  {evaluated.replace('_', ' ')} {line[evaluated]:.2f} "
    f"%  {line['images_per_second']:,.0f} images/s, "
    f"{line['waiting_fraction']:.1%} of the time waiting for data"
  )
  if line["skipped"]:
    text += f"  skipped {line['skipped']} steps that were not finite"
  return text

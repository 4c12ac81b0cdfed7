"""The metrics of a run: to a file of lines, TensorBoard and the terminal."""

import json
import math
import os
import pathlib
import time
from typing import Any, Optional
import zlib

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.train.batches import Batches
from fsam_optax.experiments.train.folder import REMEDY
from fsam_optax.experiments.train.folder import FolderError
from fsam_optax.experiments.train.folder import writing


class Journal:
  """Metrics as JSON lines, each with the ``batches`` it was written after.

  A line ends with the CRC-32 of the rest, as Python writes that as JSON.

  Attributes:
    lines: all of them, parsed.
  """

  def __init__(self, path: pathlib.Path, batches: int, epochs: int) -> None:
    """Opens the file and drops what lies after a number of batches.

    Args:
      path: the file, which need not exist.
      batches: that the run goes on from: later lines, and one that was cut,
        will be written again.
      epochs: number of them that are whole by then, each of which has a line.

    Raises:
      FolderError: if the file cannot be read, or lacks the line of an epoch
        that the checkpoint has passed.
    """
    self._path = path
    self.lines: list[dict[str, Any]] = []
    text = ""
    if path.exists():
      try:
        text = path.read_text(errors="replace")
      except OSError as error:
        raise FolderError(
          f"{str(path)!r} must be a file that can be read, got one that cannot "
          f"({error.strerror}). {REMEDY}"
        ) from error
    for line in text.splitlines():
      parsed = _parsed(line)
      if parsed is not None and parsed["batches"] <= batches:
        self.lines.append(parsed)
    written = {line["epoch"] for line in self.epochs}
    if lost := [n for n in range(1, epochs + 1) if n not in written]:
      named = ", ".join(map(str, lost[:5])) + (" and more" if lost[5:] else "")
      raise FolderError(
        f"{str(path)!r} must hold a line for each of the {epochs} epochs that "
        f"its checkpoint has passed, got none that can be read for {named}. "
        "Put the file back, delete the checkpoints from there on, or choose "
        "another --output"
      )
    kept = "".join(map(_as_line, self.lines))
    if kept != text:
      with writing(path):
        files.write(path, lambda file: file.write(kept.encode()))

  @property
  def epochs(self) -> list[dict[str, Any]]:
    """The lines on whole epochs."""
    return [line for line in self.lines if line["kind"] == "epoch"]

  def append(self, line: dict[str, Any]) -> None:
    """Writes one more line, at once."""
    with writing(self._path), self._path.open("a") as file:
      file.write(_as_line(line))
      if line["kind"] == "epoch":
        # The checkpoint that follows relies on it, whatever happens meanwhile.
        file.flush()
        os.fsync(file.fileno())
    self.lines.append(line)


def _parsed(line: str) -> Optional[dict[str, Any]]:
  """A line as it was written, or None where it is damaged."""
  try:
    parsed = json.loads(line, parse_constant=_refuse)
    is_whole = (
      parsed.pop("crc32") == _crc32(parsed)
      and type(parsed["batches"]) is int
      and isinstance(parsed["epoch"], (int, float))
      and parsed["kind"] in ("step", "epoch")
    )
    if parsed["kind"] == "epoch":
      evaluated = [name for name in parsed if name.endswith("_accuracy")]
      is_whole &= bool(evaluated) and {"loss", "accuracy"} <= parsed.keys()
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    return None
  return parsed if is_whole else None


def _refuse(constant: str):
  raise ValueError(f"{constant} is no number of JSON")


def _as_line(line: dict[str, Any]) -> str:
  """A line with a checksum, as a resume reports what stands there."""
  return json.dumps({**line, "crc32": _crc32(line)}, allow_nan=False) + "\n"


def _crc32(line: dict[str, Any]) -> int:
  return zlib.crc32(json.dumps(line, allow_nan=False).encode())


class Writer:
  """Writes the metrics of a run, and shows them as it goes.

  Where stdout is a terminal it shows a bar, and elsewhere a line an epoch.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    journal: Optional[Journal],
    *,
    tensorboard: bool,
    title: str,
    total: int,
    done: int,
    rows: int,
  ) -> None:
    """Opens what is written to.

    Args:
      folder: of the run.
      journal: gets the lines; None where another process writes.
      tensorboard: whether to write for TensorBoard.
      title: of the bar.
      total: number of batches of the whole run.
      done: number of batches that were taken before.
      rows: of a batch.
    """
    self._journal, self._shown = journal, done
    self._board = None
    self._bars: Optional[progress.Bars] = None
    if journal is None:
      return
    if tensorboard:
      import tensorboardX

      self._board = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=done + 1
      )
    self._bars = progress.Bars()
    self._advance = self._bars.start(
      title,
      total,
      done=done,
      rate=lambda speed: f"{speed * rows:,.0f} images/s",
    )

  def __enter__(self) -> "Writer":
    if self._bars is not None:
      self._bars.__enter__()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bars is not None:
      self._bars.__exit__(*exception)
    if self._board is not None:
      self._board.close()

  def step(self, line: dict[str, Any]) -> None:
    """The metrics of one step."""
    self._write("step", line)

  def epoch(self, line: dict[str, Any]) -> None:
    """The means of an epoch, and its evaluation."""
    self._write("epoch", line)
    if self._bars is not None:
      self._bars.print(epoch_line(line))

  def _write(self, kind: str, line: dict[str, Any]) -> None:
    if self._journal is None:
      return
    self._journal.append({"kind": kind, **line})
    self._advance(line["batches"] - self._shown, short_line(line))
    self._shown = line["batches"]
    if self._board is None:
      return
    for name, value in line.items():
      if isinstance(value, (int, float)) and name != "batches":
        self._board.add_scalar(f"{kind}/{name}", value, line["batches"])


def short_line(line: dict[str, Any]) -> str:
  """What is shown of a step or an epoch beside a bar."""
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
    f"{short_line(line)}  {evaluated.replace('_', ' ')} {line[evaluated]:.2f} "
    f"%  {line['images_per_second']:,.0f} images/s, "
    f"{line['waiting_fraction']:.1%} of the time waiting for data"
  )
  if line["skipped"]:
    text += f"  skipped {line['skipped']} steps that were not finite"
  return text


def finite(numbers: dict[str, Any]) -> dict[str, Any]:
  """None for what JSON has no number for."""
  return {
    name: value if value is not None and math.isfinite(value) else None
    for name, value in numbers.items()
  }


class Clock:
  """Seconds and images since the last lap."""

  def __init__(self, batches: Batches) -> None:
    """Begins the first lap.

    Args:
      batches: whose waiting is counted.
    """
    self._batches = batches
    self._start, self._waited, self._rows = time.perf_counter(), 0.0, 0

  def count(self, rows: int) -> None:
    """Adds the rows of a batch."""
    self._rows += rows

  def lap(self) -> dict[str, float]:
    """Ends a lap: its seconds, its speed and how much of it was waiting."""
    now, waited = time.perf_counter(), self._batches.waited
    seconds = now - self._start
    found = {
      "seconds": seconds,
      "images_per_second": self._rows / seconds,
      "waiting_fraction": (waited - self._waited) / seconds,
    }
    self._start, self._waited, self._rows = now, waited, 0
    return found

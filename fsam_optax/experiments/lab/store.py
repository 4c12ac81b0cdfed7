"""The store of rows: what was trained, each with the setting it was trained at.

A line of JSON a row. What is in the file already is not trained again, so a
command that was ended goes on where it was.
"""

import json
import pathlib
import sys
from typing import Any, Mapping, Optional

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.flags import FlagError

Row = dict[str, Any]
Results = dict[str, dict[str, Row]]  # A row for each arm, by setting.


class Store:
  """Rows in a file, or in memory alone where there is no path.

  Attributes:
    rows: all of them, in the order in which they came.
  """

  def __init__(self, path: Optional[pathlib.Path] = None) -> None:
    """Reads what is there."""
    self._path, self.rows = path, []
    self.read()
    self._number_before = len(self.rows)

  def read(self) -> list[Row]:
    """The rows, with those that other processes have added to the file."""
    if self._path is None or not self._path.exists():
      return self.rows
    with files.naming_output(self._path.parent):
      *lines, rest = self._path.read_bytes().split(b"\n")
    if _row(rest):
      lines.append(rest)
    elif rest:  # Its process was ended.
      print(f"note: half a row ends {self._path}", file=sys.stderr)
    rows = [_row(line) for line in lines]
    if None in rows:
      raise FlagError(
        "--output",
        f"must have rows of JSON in {self._path.name}, got "
        f"{str(lines[rows.index(None)][:60])[1:]}. Delete that line, or choose "
        "another directory",
      )
    self.rows = [row for row in rows if row is not None]
    return self.rows

  def find(self, key: Mapping[str, Any]) -> Optional[Row]:
    """The row with these fields; a field that it lacks may be anything."""
    for i, row in enumerate(self.rows):
      if all(row.get(name, value) == value for name, value in key.items()):
        if i < self._number_before:
          print(f"note: rows of {self._path} are used again", file=sys.stderr)
          self._number_before = 0  # It is said once.
        return row
    return None

  def append(self, row: Row) -> Row:
    """Adds a row, and returns it."""
    self.rows.append(row)
    if self._path is None:
      return row
    line = json.dumps(row).encode() + b"\n"
    with files.naming_output(self._path.parent), self._path.open("a+b") as file:
      file.seek(0)
      before, end, rest = file.read().rpartition(b"\n")
      if _row(rest):
        line = b"\n" + line
      elif rest:
        file.truncate(len(before + end))
      # In one write: another process may append to the same file.
      file.write(line)
    return row


def _row(line: bytes) -> Optional[Row]:
  """The row of a line; None where there is another thing, or half of one."""
  try:
    row = dict(json.loads(line))
  except (ValueError, TypeError):
    return None
  return row if {"phase", "arm", "seeds"} <= row.keys() else None

"""The store of rows: what was trained, each with the setting it was trained at.

A line of JSON a row. What is in the file already is not trained again, so a
command that was ended goes on where it was.
"""

import json
import pathlib
import sys
from typing import Any, Mapping, Optional

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
    if path is not None and path.exists():
      try:
        lines = path.read_text(encoding="utf-8").splitlines()
        self.rows: list[Row] = [json.loads(line) for line in lines]
      except ValueError as error:
        raise FlagError(
          "--output",
          f"must have rows of JSON in {path.name}, got another line ({error}). "
          "Delete that line, or choose another directory",
        ) from error
    self._number_before = len(self.rows)

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
    if self._path is not None:
      # A line in one write: another process may append to the same file.
      with self._path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row

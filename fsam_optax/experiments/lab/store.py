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
    try:
      with files.naming_output(self._path):
        text = self._path.read_text(encoding="utf-8")
      whole, _, rest = text.rpartition("\n")
      if rest:  # Its process was ended.
        print(f"note: half a row of {self._path} is dropped", file=sys.stderr)
        self._path.write_text(whole and f"{whole}\n", encoding="utf-8")
      self.rows = [json.loads(line) for line in whole.splitlines()]
      for row in self.rows:
        if not {"phase", "arm", "seeds"} <= dict(row).keys():
          raise ValueError("a row of another kind")
    except (ValueError, TypeError) as error:
      raise FlagError(
        "--output",
        f"must have rows of JSON in {self._path.name}, got another line "
        f"({error}). Delete that line, or choose another directory",
      ) from error
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
    if self._path is not None:
      # A line in one write: another process may append to the same file.
      with (
        files.naming_output(self._path),
        self._path.open("a", encoding="utf-8") as file,
      ):
        file.write(json.dumps(row) + "\n")
    return row

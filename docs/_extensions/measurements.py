"""Tables of measurements, from the files that hold the measurements.

``study NAME INDEX`` is a table of ``docs/studies/NAME.json``, or of
``docs/compare.json``, as the study wrote it. Every other name is declared in
``docs/measurements/tables.toml``.
"""

import functools
import json
import pathlib
import tomllib

from fsam_optax.experiments.common import tables

DOCS = pathlib.Path(__file__).parents[1]
FOLDERS = (DOCS, DOCS / "studies", DOCS / "measurements")


@functools.cache
def _read(name: str):
  text = (DOCS / name).read_text(encoding="utf-8")
  if name.endswith(".toml"):
    return tomllib.loads(text)
  if name.endswith(".jsonl"):
    return [json.loads(line) for line in text.splitlines()]
  return json.loads(text)


def table(asked: str):
  """The header and the rows of a table, all of them text."""
  name, *arguments = asked.split()
  if name != "study":
    return _declared(_read("measurements/tables.toml")[name])
  study, index = arguments
  file = "compare.json" if study == "compare" else f"studies/{study}.json"
  studied = _read(file)["tables"][int(index)]
  rows = [[tables.shown(cell) for cell in row] for row in studied["rows"]]
  return studied["header"], rows


def markdown(asked: str) -> list[str]:
  """The lines of a table."""
  header, rows = table(asked)
  line = lambda cells: "| " + " | ".join(x or " " for x in cells) + " |"
  return [line(header), "|" + "---|" * len(header), *map(line, rows)]


_BESIDE = ("head", "rows", "columns", "each", "file", "title", "cell")


def _declared(declared):
  """A table of tables.toml, which says what its fields mean."""
  lists = _read("measurements/tables.toml")["rows"]
  rows = []
  for row in declared.get("rows", ()):
    rows += lists[row] if isinstance(row, str) else [row]
  if each := declared.get("each"):
    found = {tuple(x[field] for field in each): x for x in _rows(declared)}
    rows = [dict(zip(("title", *each), (x[0], *x), strict=True)) for x in found]
  columns = [declared | column for column in declared["columns"]]
  return [declared["head"], *(_text(x, x["title"]) for x in columns)], [
    [row["title"], *(_cell(column | row) for column in columns)] for row in rows
  ]


def _rows(place):
  """The rows of its file that have its fields."""
  found = _read(f"measurements/{place['file']}")
  wanted = [(x, value) for x, value in place.items() if x not in _BESIDE]
  return [
    row
    for row in (found if isinstance(found, list) else found["rows"])
    if all(row[field] == value for field, value in wanted)
  ]


def _cell(place) -> str:
  """A cell; empty where its row is not there, or lacks what is asked for."""
  try:
    return _text(place, place["cell"], **_rows(place)[-1])
  except (IndexError, NameError):
    return ""


def _text(place, template: str, **fields) -> str:
  """A template, with the fields of a row and other steps of its setting."""
  of = lambda step: _rows(place | {"step": step})[-1]
  return eval(f"f'''{template}'''", {"of": of, **fields})

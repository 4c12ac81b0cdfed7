"""Tables are made from files, and the README's say the same as the files."""

import json
import pathlib
import re
import tomllib

import measurements
import numpy as np
import pages
from pages import DOCS
import pytest

DECLARED = tomllib.loads((DOCS / "measurements" / "tables.toml").read_text())


def typed(path: pathlib.Path) -> list[list[list[str]]]:
  """The tables that are written out on a page: header, rule and rows."""
  text = path.read_text()
  for _, block in pages.blocks(path):
    text = text.replace(block, "")
  return [
    cells(table.splitlines())
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M)
  ]


def cells(lines: list[str]) -> list[list[str]]:
  """A table in Markdown, taken apart."""
  return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def in_the_readme(first: str, second: str) -> list[list[list[str]]]:
  """The README's table of these first two titles."""
  tables = typed(pages.README)
  (table,) = (x for x in tables if x[0][:2] == [first, second])
  return table


def test_every_table_that_a_page_asks_for_is_made_whole():
  text = "".join(path.read_text() for path in pages.PAGES)
  names = set(re.findall(r"^```\{measured\} (.+)$", text, re.M))
  tables = {"study", *DECLARED} - {"rows"}
  assert {name.split()[0] for name in names} == tables
  for name in names:
    header, rows = measurements.table(name)
    assert {len(row) for row in rows} == {len(header)}, name
    assert all(any(row[1:]) for row in rows), name
    lines = cells(measurements.markdown(name))
    assert [lines[0], *lines[2:]] == [header, *rows], name


def test_costs_are_not_typed():
  assert not [x.name for x in DOCS.glob("cost/*.md") if typed(x)]


@pytest.mark.parametrize(
  ("titles", "name"),
  [
    (("", "learning rate"), "study compare -1"),
    (("step", "time, CPU"), "multiples"),
  ],
  ids=["compare", "multiples"],
)
def test_the_readme_has_the_table_of_the_page(titles, name):
  here, made = in_the_readme(*titles), cells(measurements.markdown(name))
  plain = [[cell.strip("*") for cell in row] for row in here]
  assert [plain[0], *plain[2:]] == [made[0], *made[2:]]


def test_the_readme_says_what_compare_measured():
  results = json.loads((DOCS / "compare.json").read_text())["results"]
  by_label = {"SGD": "sgd", "SAM": "sam", "F-SAM": "fsam"}
  of = lambda label: results[by_label[label]]
  number = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
  _, _, *rows = in_the_readme("", "learning rate")
  assert {row[0] for row in rows} == set(by_label)
  for label, _, _, decay, mean_and_error, difference in rows:
    accuracy = of(label)["test_accuracy"]
    assert float(decay) == of(label)["weight_decay"]
    assert number(mean_and_error) == rounded(accuracy)
    if difference:
      other = of(difference.removeprefix("over ").partition(":")[0])
      pairs = np.subtract(accuracy, other["test_accuracy"])
      assert number(difference)[:2] == rounded(pairs)


def rounded(values) -> list[float]:
  """Mean and standard error as printed."""
  error = np.std(values, ddof=1) / len(values) ** 0.5
  return [round(float(x), 2) for x in (np.mean(values), error)]


@pytest.mark.parametrize(
  ("column", "file", "model", "rows", "field"),
  [
    (1, "step_cost", "mlp", 256, "milliseconds"),
    (2, "step_cost_gpu", "resnet18", 128, "main_memory_words"),
    (3, "step_cost_gpu", "perceptron", 128, "main_memory_words"),
    (4, "step_cost_tpu", "perceptron", 128, "main_memory_words"),
  ],
  ids=["time on a CPU", "ResNet-18 on a GPU", "GPU", "TPU"],
)
def test_the_readme_says_what_a_step_costs(column, file, model, rows, field):
  text = (DOCS / "measurements" / f"{file}.json").read_text()
  measured = {
    row["step"]: row[field]
    for row in json.loads(text)["rows"]
    if (row["model"], row["batch_size"]) == (model, rows)
  }
  steps = {row["title"]: row["step"] for row in DECLARED["rows"]["choices"]}
  _, _, *table = in_the_readme("step", "time, CPU")
  assert [row[0] for row in table] == list(steps)
  # A median of ratios is not quite the ratio of medians.
  close = 0.05 if field == "milliseconds" else 0.0051
  for row in table:
    over = measured[steps[row[0]]] / measured["SGD"]
    assert float(row[column]) == pytest.approx(over, abs=close)

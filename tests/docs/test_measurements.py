"""Tables are made from files, and the README's say the same as the files."""

import importlib
import json
import pathlib
import re
import sys

import numpy as np
import pages
import pytest

ROOT = pathlib.Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def measurements():
  """What the documentation's tables are made by."""
  sys.path.insert(0, str(DOCS / "_extensions"))
  try:
    return importlib.import_module("measurements")
  finally:
    del sys.path[0]


def asked_for() -> set[str]:
  """What pages give the directive, with its arguments."""
  return {
    name
    for path in DOCS.glob("**/*.md")
    if "_build" not in path.parts
    for name in re.findall(r"^```\{measured\} (.+)$", path.read_text(), re.M)
  }


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
  tables = typed(ROOT / "README.md")
  (table,) = (x for x in tables if x[0][:2] == [first, second])
  return table


def test_every_table_that_a_page_asks_for_is_made_whole(measurements):
  names = asked_for()
  assert {name.split()[0] for name in names} == set(measurements.TABLES)
  for name in names:
    table, *arguments = name.split()
    header, rows = measurements.TABLES[table](*arguments)
    assert {len(row) for row in rows} == {len(header)}, name
    lines = cells(measurements.markdown(name))
    assert [lines[0], *lines[2:]] == [header, *rows], name


def test_a_table_says_where_weight_decay_was_not_tuned(measurements):
  tuned = {x for x in asked_for() if measurements.is_decay_tuned(x)}
  costs = {"costs", "tpu", "cpu", "peers", "scaling", "pods", "train"}
  assert {name.split()[0] for name in tuned} <= costs | {"compare", "study"}
  assert {name for name in tuned if name.startswith("study")} == {
    "study label-noise 0",
    "study label-noise 1",
  }


def test_an_exponent_costs_what_the_search_lost_by_it(
  measurements, monkeypatch
):
  """Between two radii of a ladder by eights, whose middle is the best."""

  def row(arm, noise, **rest):
    setting = {"dataset": "digits", "model": "mlp", "label_noise": noise}
    return {"arm": arm, **setting, **rest}

  eighth = "F-SAM, 1/8, descent average"
  rows = [
    row(eighth, 0.0, coarse=[[0.1, 0.8, 6.4], [80.0, 90.0, 70.0]]),
    row("F-SAM", 0.0, rho=0.1),
    row(eighth, 0.6, coarse=[[0.1, 0.8, 6.4], [30.0, 20.0, 10.0]]),
    row("F-SAM", 0.6, rho=0.1),
  ]
  monkeypatch.setattr(measurements, "_read", lambda name: rows)
  header, found = measurements.pareto_exponents()
  assert header == ["exponent", "0 % wrong", "60 % wrong"]
  # At 0.1 * 8**e the first has climbed a part e of ten points, the second lost.
  assert found == [
    [f"{e:g}", f"{10 * e - 10:.2f}", f"{0 - 10 * e:.2f}"]
    for e in (0, 0.1, 0.2, 0.3, 0.4)
  ]


def test_costs_are_not_typed():
  assert not [x.name for x in DOCS.glob("cost/*.md") if typed(x)]


def test_columns_are_left_out_by_their_titles(measurements):
  whole = cells(measurements.markdown("costs"))
  part = cells(measurements.markdown("costs", ["words, TPU"]))
  assert part == [[first, *rest] for first, _, *rest in whole]


@pytest.mark.parametrize(
  ("titles", "name"),
  [(("", "learning rate"), "compare"), (("step", "words, TPU"), "costs")],
  ids=["compare", "costs"],
)
def test_the_readme_has_the_table_of_the_page(measurements, titles, name):
  here, made = in_the_readme(*titles), cells(measurements.markdown(name))
  assert [here[0], *here[2:]] == [made[0], *made[2:]]


def test_the_readme_says_what_compare_measured():
  report = json.loads((DOCS / "compare.json").read_text())
  accuracy = {
    {"sgd": "SGD", "sam": "SAM", "fsam": "F-SAM"}[name]: x["test_accuracy"]
    for name, x in report["results"].items()
  }
  _, _, *rows = in_the_readme("", "learning rate")
  assert {row[0] for row in rows} == set(accuracy)
  for name, _, _, decay, mean_and_error, difference in rows:
    result = report["results"][{"F-SAM": "fsam"}.get(name, name.lower())]
    assert float(decay) == result["weight_decay"]
    number = lambda text: [float(x) for x in re.findall(r"-?\d+\.\d+", text)]
    assert number(mean_and_error) == rounded(accuracy[name])
    if difference:
      other = difference.removeprefix("over ").partition(":")[0]
      pairs = np.subtract(accuracy[name], accuracy[other])
      assert number(difference)[:2] == rounded(pairs)


def rounded(values) -> list[float]:
  """Mean and standard error as printed."""
  error = np.std(values, ddof=1) / len(values) ** 0.5
  return [round(float(x), 2) for x in (np.mean(values), error)]


IN_THE_FILES = {
  "optax.contrib.sam": "optax.contrib.sam",
  "`fsam` in a chain": "fsam in a chain",
  "train step, default": "train step (default)",
  '`ascent_fraction=1/8, ema_gradient="descent"`': (
    "train step, 1/8, average of the descent"
  ),
}


@pytest.mark.parametrize(
  ("column", "file", "model", "rows", "field", "digits"),
  [
    (1, "step_cost_tpu", "perceptron", 128, "words_above_floor", 1),
    (2, "step_cost", "mlp", 8, "words_above_floor", 1),
    (3, "step_cost", "mlp", 256, "ratio_to_floor", 2),
  ],
  ids=["words on a TPU", "words on a CPU", "times on a CPU"],
)
def test_the_readme_says_what_a_step_costs(
  column, file, model, rows, field, digits
):
  text = (DOCS / "measurements" / f"{file}.json").read_text()
  found = {
    row["step"]: row.get(field)
    for row in json.loads(text)["rows"]
    if (row["model"], row["batch_size"]) == (model, rows)
  }
  _, _, *table = in_the_readme("step", "words, TPU")
  assert {row[0]: row[column] for row in table} == {
    name: f"{found[step]:.{digits}f}" for name, step in IN_THE_FILES.items()
  }

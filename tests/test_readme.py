"""The README's code runs as printed, and its numbers are the measured ones."""

import json
import pathlib
import re

import pages
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_python_blocks_run_in_order_on_both_sides_of_the_diff(sign, capsys):
  namespace = pages.run(README, sign)
  assert int(namespace["state"].step) == len(namespace["batches"])
  namespace["nnx_step"](
    namespace["model"], namespace["optimizer"], namespace["batches"][0]
  )
  assert "'sharpness'" in capsys.readouterr().out


DIFFS = [text for language, text in pages.blocks(README) if language == "diff"]


@pytest.mark.parametrize("diff", DIFFS, ids=["optax", "nnx"])
def test_a_diff_changes_two_lines(diff):
  lines = diff.splitlines()
  assert sum(line.startswith("+") for line in lines) == 2
  assert sum(line.startswith("-") for line in lines) == 2


def test_set_up_commands_are_one_line_each():
  setup = [
    line
    for language, text in pages.blocks(README)
    if language == "bash"
    for line in text.splitlines()
    if line.startswith("python3 -m venv")
  ]
  assert len(setup) == 2
  assert all(line.rstrip()[-1] not in "\\&" for line in setup)


def test_every_block_has_a_language_that_a_test_covers():
  # "bash" is run by the gate; "bibtex" is not code.
  languages = {language for language, _ in pages.blocks(README)}
  assert languages <= {"python", "diff", "bash", "bibtex"}


def test_is_read_in_a_few_minutes():
  assert len(README.read_text().splitlines()) <= 190


def test_links_lead_to_files_of_the_repository():
  found = re.findall(r"\]\(([^)#]+)", README.read_text())
  files = [link for link in found if not link.startswith("https://")]
  assert len(files) > 20
  assert not [link for link in files if not (ROOT / link).exists()]


def tables(path: pathlib.Path) -> list[str]:
  """The tables of a page."""
  return re.findall(r"(?:^\|.*\n)+", path.read_text(), re.M)


@pytest.mark.parametrize(
  ("title", "page"),
  [
    ("| | learning rate | rho |", "commands/compare.md"),
    ("| step | words, TPU |", "cost/index.md"),
  ],
  ids=["compare", "cost"],
)
def test_a_table_is_that_of_its_page(title, page):
  (here,) = (table for table in tables(README) if table.startswith(title))
  assert here in tables(ROOT / "docs" / page)


IN_THE_FILE = {
  "optax.contrib.sam": "optax.contrib.sam",
  "`fsam` in a chain": "fsam in a chain",
  "train step, default": "train step (default)",
  '`ascent_fraction=1/8, ema_gradient="descent"`': (
    "train step, 1/8, average of the descent"
  ),
}


def test_words_on_a_tpu_are_the_compilers():
  text = (ROOT / "docs" / "step_cost_tpu.json").read_text()
  words = {
    row["step"]: row.get("words_above_floor")
    for row in json.loads(text)["rows"]
    if row["model"] == "perceptron"
  }
  (table,) = (x for x in tables(README) if x.startswith("| step | words"))
  found = re.findall(r"^\| (.+?) \| ([\d.]+) \|", table, re.M)
  assert dict(found) == {
    name: f"{words[step]:.1f}" for name, step in IN_THE_FILE.items()
  }

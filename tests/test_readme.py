"""The README's code runs as printed, and its tables say what tests hold."""

import pathlib
import re

import pytest
import test_composition

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks():
  """The fenced blocks of the README, as pairs of language and text."""
  return re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), re.M | re.S)


def applied(diff: str, sign: str) -> str:
  """One side of a diff: the lines that are common or have the sign."""
  lines = diff.splitlines()
  assert all(line[:1] in (" ", "-", "+") for line in lines if line)
  return "\n".join(line[1:] for line in lines if line[:1] in (" ", sign))


@pytest.mark.parametrize("sign", ["-", "+"], ids=["before", "after"])
def test_python_blocks_run_in_order_on_both_sides_of_the_diff(sign, capsys):
  namespace: dict = {}
  ran = 0
  for language, text in blocks():
    if language == "diff":
      text = applied(text, sign)
    elif language != "python":
      continue
    exec(compile(text, f"README block {ran}", "exec"), namespace)
    ran += 1
  assert ran == 12
  assert int(namespace["state"].step) == 2 * len(namespace["batches"]) + 2
  assert "'sharpness'" in capsys.readouterr().out


DIFFS = [text for language, text in blocks() if language == "diff"]


@pytest.mark.parametrize("diff", DIFFS, ids=["optax", "nnx"])
def test_a_diff_changes_two_lines(diff):
  lines = diff.splitlines()
  assert sum(line.startswith("+") for line in lines) == 2
  assert sum(line.startswith("-") for line in lines) == 2


def test_set_up_commands_are_one_line_each():
  commands = [text for language, text in blocks() if language == "bash"]
  setup = [
    line
    for command in commands
    for line in command.splitlines()
    if line.startswith("python3 -m venv")
  ]
  assert len(setup) == 3
  assert all(line.rstrip()[-1] not in "\\&" for line in setup)


def test_every_block_has_a_language_that_a_test_covers():
  # "bash" is run by the gate; "bibtex" and "math" are not code.
  languages = {language for language, _ in blocks()}
  assert languages <= {"python", "diff", "bash", "bibtex"}


def test_the_composition_table_is_the_one_that_is_tested():
  table = "\n".join(
    ["| with | what holds |", "|---|---|"]
    + [f"| {name} | {claim} |" for name, claim in test_composition.ROWS]
  )
  section = re.search(
    r"<!-- composition:.*?-->\n(.*?)\n<!-- end of composition -->",
    README.read_text(),
    re.S,
  )
  assert section
  assert section[1] == table

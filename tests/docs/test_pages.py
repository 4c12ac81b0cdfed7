"""The documentation's code runs, and its tables say what tests hold."""

import re
import subprocess
import sys

import pages
from pages import DOCS
from pages import PAGES
from pages import README
from pages import ROOT
import pytest
import test_composition

TRAIN = DOCS / "commands" / "train.md"  # Needs a run to read from.
WITH_CODE = [
  path
  for path in PAGES
  if path not in (README, TRAIN)
  if any(language == "python" for language, _ in pages.blocks(path))
]


def test_there_is_code_on_the_pages():
  assert len(WITH_CODE) >= 11


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_a_page_runs_from_its_top(path):
  pages.run(path)


@pytest.mark.slow
def test_a_trained_network_is_restored_and_predicts(tmp_path, monkeypatch):
  (command,) = (
    text
    for language, text in pages.blocks(TRAIN)
    if language == "bash" and "--output runs/mnist" in text
  )
  python, *arguments = command.replace("\\\n", "").split()
  assert python == ".venv/bin/python"
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("PYTHONPATH", str(ROOT))
  subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
  namespace = pages.run(TRAIN)
  assert namespace["logits"].shape == (3, 10)


def test_set_up_commands_are_one_line_each():
  setup = [
    line
    for path in PAGES
    for language, text in pages.blocks(path)
    if language == "bash"
    for line in text.splitlines()
    if line.startswith("python3 -m venv")
  ]
  assert len(setup) == 5
  assert all(line.rstrip()[-1] not in "\\&" for line in setup)


def test_nothing_is_installed_from_an_index_that_has_not_its_name():
  suffixes = (".md", ".py", ".ipynb")
  for path in (ROOT / room for room in ("docs", "fsam_optax", "notebooks")):
    for file in path.rglob("*"):
      if file.suffix in suffixes and "_build" not in file.parts:
        text = file.read_text().replace("\\", "")
        assert not re.search(r"pip install.{0,9} .?fsam-optax\b", text), file


def test_every_study_is_on_a_page():
  text = "".join(path.read_text() for path in DOCS.glob("evidence/*.md"))
  for path in DOCS.glob("studies/*.json"):
    assert f"study {path.stem} " in text


def test_languages_of_blocks_are_known():
  # "py" is Python that needs a package of its own; it is only compiled. "bash"
  # is run by the gate; "bibtex" is not code.
  in_the_readme = {"python", "diff", "bash", "bibtex"}
  known = {"py", "{toctree}", "{eval-rst}", "{measured}", "{include}"}
  known |= {"{code-cell}", *in_the_readme}
  for path in PAGES:
    for language, text in pages.blocks(path):
      assert language in (in_the_readme if path == README else known), path
      if language == "py":
        compile(text, path.name, "exec")


def test_the_composition_table_is_the_one_that_is_tested():
  table = "\n".join(
    ["| with | what holds |", "|---|---|"]
    + [f"| {name} | {claim} |" for name, claim in test_composition.ROWS]
  )
  section = re.search(
    r"<!-- composition:.*?-->\n(.*?)\n<!-- end of composition -->",
    (DOCS / "guides" / "optax.md").read_text(),
    re.S,
  )
  assert section
  assert section[1] == table


def test_images_have_alternative_texts():
  for path in PAGES:
    for text in re.findall(r"!\[([^\]]*)\]", path.read_text()):
      assert len(text) > 30, (path.name, text)

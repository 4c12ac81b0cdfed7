"""The README's code runs as printed, and its links lead somewhere."""

import re

import pages
from pages import README
import pytest


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
def test_a_diff_changes_few_lines(diff):
  lines = diff.splitlines()
  assert sum(line.startswith("+") for line in lines) <= 5
  assert sum(line.startswith("-") for line in lines) <= 3


def test_no_line_of_code_is_wider_than_its_box():
  for path in pages.PAGES:
    for language, text in pages.blocks(path):
      for line in text.splitlines():
        # Commands that set up are one line, to be copied at once.
        is_code = language and not line.startswith("python3 -m venv")
        assert len(line) <= 75 or not is_code, (path.name, line)


def test_is_read_in_a_few_minutes():
  assert len(README.read_text().splitlines()) <= 190


def test_links_lead_to_files_of_the_repository():
  found = re.findall(r"\]\(([^)#]+)", README.read_text())
  files = [link for link in found if not link.startswith("https://")]
  assert len(files) > 20
  assert not [link for link in files if not (pages.ROOT / link).exists()]

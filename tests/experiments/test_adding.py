"""What CONTRIBUTING.md adds by a file or a line is there by these alone."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pages
import pytest

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = """
from fsam_optax import __main__
main = lambda words: __main__.main(words.split())
images = "--data stripes --model linear --label-noise 0"
main("study order --quick --output order")
main(f"compare {images} --seeds 2 --epochs 9 --optimizers mine fsam")
"""


@pytest.mark.slow
def test_a_file_or_a_line_adds_what_every_command_then_knows(tmp_path):
  shutil.copytree(ROOT / "fsam_optax", tmp_path / "fsam_optax")
  changes = {"python": [], "diff": []}
  for language, text in pages.blocks(ROOT / "CONTRIBUTING.md"):
    if language in changes:
      first, rest = text.split("\n", 1)
      changes[language].append((tmp_path / first.split("# ")[1], rest))
  for path, code in changes["python"]:
    assert not path.exists()
    path.write_text(code)
  assert len(changes["python"]) == 3
  assert len(changes["diff"]) == 2
  for path, diff in changes["diff"]:
    before, added = re.fullmatch(r" (.+\n)\+(.+\n)", diff).groups()
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, before + added))
  subprocess.run(
    [sys.executable, "-c", COMMANDS],
    cwd=tmp_path,
    env={**os.environ, "PYTHONPATH": str(tmp_path)},
    check=True,
  )
  study = json.loads((tmp_path / "order" / "order-quick.json").read_text())
  (tested,) = study["results"].values()
  assert list(tested) == ["official", "SAM", "paper"]
  lines = (tmp_path / "order" / "order-quick.jsonl").read_text().splitlines()
  phases = [json.loads(line)["phase"] for line in lines]
  assert phases == ["search", "search", "candidate", "test"] * 3
  compared = json.loads((tmp_path / "compare" / "compare.json").read_text())
  (line,) = compared["panels"][1]["series"]
  assert line["label"] == "F-SAM over mine"
  assert compared["config"]["dataset"] == "stripes"
  assert compared["config"]["model"] == "linear"
  results = compared["results"]
  assert results["mine"]["rho"] == results["fsam"]["rho"]
  assert min(results["mine"]["test_accuracy"]) > 90

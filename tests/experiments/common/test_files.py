"""Files that are written whole or not at all."""

import json
import pathlib

import pytest

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.flags import FlagError


def test_json_is_strict_and_nothing_else_is_left(tmp_path):
  path = tmp_path / "result.json"
  files.write_json({"a": [1, None]}, path)
  assert json.loads(path.read_text()) == {"a": [1, None]}
  with pytest.raises(ValueError, match="not JSON compliant"):
    files.write_json({"a": float("nan")}, path)
  assert json.loads(path.read_text()) == {"a": [1, None]}
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_filled_leaves_that_of_before(tmp_path):
  path = tmp_path / "file"
  path.write_text("before")

  def fill(file):
    file.write(b"half")
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    files.write(path, fill)
  assert path.read_text() == "before"
  assert list(tmp_path.iterdir()) == [path]


def test_an_address_is_no_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FlagError, match="must be a directory of this machine"):
    files.make_output(pathlib.Path("gs://bucket/run"))
  assert not list(tmp_path.iterdir())

"""Every public name is in the API reference, with the sections it needs."""

import importlib.util
import pathlib
import re

import pytest

import fsam_optax

ROOT = pathlib.Path(__file__).parents[2]
PATH = ROOT / "docs" / "_extensions" / "public_names.py"


@pytest.fixture(scope="module")
def reference():
  """The check that the documentation is built with."""
  spec = importlib.util.spec_from_file_location(PATH.stem, PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def listed() -> set[str]:
  """The names on the pages of the API reference."""
  found = set()
  for path in (ROOT / "docs" / "api").glob("*.md"):
    module = ""
    for line in path.read_text().splitlines():
      if match := re.match(r"\.\. currentmodule:: (\S+)", line):
        module = match[1]
      elif match := re.fullmatch(r" {3}(\w+)", line):
        found.add(f"{module}.{match[1]}")
  return found


def test_the_reference_lists_the_public_names(reference):
  assert listed() == set(reference.public_names())


def test_docstrings_have_their_sections(reference):
  lacking = {
    name: missing
    for name, value in reference.public_names().items()
    if (missing := reference.lacks(value))
  }
  assert not lacking


def test_a_section_that_lacks_is_named(reference):
  def function(x: int) -> int:
    """Does something."""
    if x < 0:
      raise ValueError(x)
    return x

  assert reference.lacks(function) == ["Args", "Returns", "Raises"]
  assert reference.lacks(fsam_optax.fsam) == []

"""Every public name is in the API reference, with the sections it needs."""

import re

import pages

import fsam_optax

reference = pages.extension("public_names")


def listed() -> set[str]:
  """The names on the pages of the API reference."""
  found = set()
  for path in (pages.DOCS / "api").glob("*.md"):
    module = ""
    for line in path.read_text().splitlines():
      if match := re.match(r"\.\. currentmodule:: (\S+)", line):
        module = match[1]
      elif match := re.fullmatch(r" {3}(\w+)", line):
        found.add(f"{module}.{match[1]}")
  return found


def test_the_reference_lists_the_public_names():
  assert listed() == set(reference.public_names())


def test_docstrings_have_their_sections():
  lacking = {
    name: missing
    for name, value in reference.public_names().items()
    if (missing := reference.lacks(value))
  }
  assert not lacking


def test_a_section_that_lacks_is_named():
  def function(x: int) -> int:
    """Does something."""
    if x < 0:
      raise ValueError(x)
    return x

  assert reference.lacks(function) == ["Args", "Returns", "Raises"]
  assert reference.lacks(fsam_optax.fsam) == []

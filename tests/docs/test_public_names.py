"""Every public name is in the API reference, with the sections it needs.

A public name is what `fsam_optax` and its public submodules export: a name
without an underscore whose object is defined in this package, in that very
module for a submodule that is one file.
"""

import inspect
import re

from pages import DOCS

import fsam_optax
from fsam_optax import checkpoint
from fsam_optax import masks
from fsam_optax import nnx
from fsam_optax import sharding
from fsam_optax import sharpness

FACES = (fsam_optax, sharpness)  # What they hold comes from private modules.
MODULES = (masks, nnx, sharding, checkpoint)


def public_names() -> dict[str, object]:
  """Every public function and class, by its full name."""
  found = {}
  for module in (*FACES, *MODULES):
    home = "fsam_optax" if module in FACES else module.__name__
    for name, value in vars(module).items():
      is_ours = getattr(value, "__module__", "").startswith(home)
      if callable(value) and is_ours and not name.startswith("_"):
        found[f"{module.__name__}.{name}"] = value
  return found


def lacks(value: object) -> list[str]:
  """What is missing in the docstring of a function or class."""
  text = inspect.getdoc(value) or ""
  has = lambda section: re.search(rf"^{section}:$", text, re.M)
  if not text:
    return ["docstring"]
  if inspect.isclass(value):
    fields = getattr(value, "_fields", ())
    missing = ["Attributes"] if fields and not has("Attributes") else []
    for name, member in vars(value).items():
      member = getattr(member, "__func__", member)  # Of a class method.
      is_ours = getattr(member, "__module__", "").startswith("fsam_optax")
      if inspect.isfunction(member) and is_ours and not name.startswith("_"):
        missing += [f"{x} (of {name})" for x in lacks(member)]
    return missing
  signature = inspect.signature(value)
  needed = {
    "Args": signature.parameters.keys() - {"self", "cls"},
    "Returns": signature.return_annotation is not None,
    "Raises": re.search(r"^\s+raise ", inspect.getsource(value), re.M),
  }
  return [
    name for name, is_needed in needed.items() if is_needed and not has(name)
  ]


def listed() -> set[str]:
  """The names on the pages of the API reference."""
  found = set()
  for path in (DOCS / "api").glob("*.md"):
    module = ""
    for line in path.read_text().splitlines():
      if match := re.match(r"\.\. currentmodule:: (\S+)", line):
        module = match[1]
      elif match := re.fullmatch(r" {3}(\w+)", line):
        found.add(f"{module}.{match[1]}")
  return found


def test_the_reference_lists_the_public_names():
  assert listed() == set(public_names())


def test_docstrings_have_their_sections():
  lacking = {name: lacks(value) for name, value in public_names().items()}
  assert not any(lacking.values()), lacking


def test_a_section_that_lacks_is_named():
  def function(x: int) -> int:
    """Does something."""
    if x < 0:
      raise ValueError(x)
    return x

  assert lacks(function) == ["Args", "Returns", "Raises"]
  assert lacks(fsam_optax.fsam) == []

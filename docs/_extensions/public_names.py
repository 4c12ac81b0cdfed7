"""The build fails where the API reference lacks a public name or section.

A public name is what ``fsam_optax`` and its public submodules export: a name
without an underscore whose object is defined in this package, in that very
module for a submodule that is one file.
"""

import inspect
import re

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
    for name, value in vars(module).items():
      if name.startswith("_") or not callable(value):
        continue
      home = getattr(value, "__module__", "")
      if module in FACES and not home.startswith("fsam_optax"):
        continue
      if module in MODULES and home != module.__name__:
        continue
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
  missing = []
  signature = inspect.signature(value)
  if signature.parameters.keys() - {"self", "cls"} and not has("Args"):
    missing.append("Args")
  if signature.return_annotation is not None and not has("Returns"):
    missing.append("Returns")
  if re.search(r"^\s+raise ", inspect.getsource(value), re.M) and not has(
    "Raises"
  ):
    missing.append("Raises")
  return missing


def _check(app, env):
  from sphinx.util import logging  # The rest is for the tests, too.

  del app
  logger = logging.getLogger(__name__)
  documented = env.get_domain("py").objects
  for name, value in public_names().items():
    if name not in documented:
      logger.warning(
        "%s is public and on no page of the API reference: add it to a list "
        "in docs/api",
        name,
      )
    for section in lacks(value):
      logger.warning("the docstring of %s lacks %s", name, section)


def setup(app):
  """Checks once all pages are read."""
  app.connect("env-check-consistency", _check)
  return {"parallel_read_safe": True, "parallel_write_safe": True}

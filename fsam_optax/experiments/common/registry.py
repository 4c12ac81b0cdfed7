"""A registry: what the files of a room declare, by name."""

import importlib
import pkgutil
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)


def of(room: str, kind: type[T]) -> dict[str, T]:
  """The variables of a package's modules that are of a kind, by name."""
  files = pkgutil.iter_modules(importlib.import_module(room).__path__)
  return {
    entry.name: entry
    for file in files
    for entry in vars(importlib.import_module(f"{room}.{file.name}")).values()
    if isinstance(entry, kind)
  }

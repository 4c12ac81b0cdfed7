"""A registry: what the files of a room declare, by name."""

import importlib
from typing import Any, Sequence, TypeVar

T = TypeVar("T", bound=Any)


def of(room: str, files: Sequence[str], kind: type[T]) -> dict[str, T]:
  """The variables of some modules of a package that are of a kind, by name."""
  return {
    entry.name: entry
    for file in files
    for entry in vars(importlib.import_module(f"{room}.{file}")).values()
    if isinstance(entry, kind)
  }

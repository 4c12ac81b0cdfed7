"""A registry: what the files of a room declare, by name."""

import importlib
from typing import Any, Sequence, TypeVar

T = TypeVar("T")


def of(room: str, files: Sequence[str], kind: type[T]) -> dict[str, T]:
  """The variables of some modules of a package that are of a kind, by name."""
  modules = [importlib.import_module(f"{room}.{file}") for file in files]
  entries: list[Any] = [
    value
    for module in modules
    for value in vars(module).values()
    if isinstance(value, kind)
  ]
  return {entry.name: entry for entry in entries}

"""A registry: what the files of a room declare, by name."""

from collections.abc import Sequence
import importlib
from typing import Any, TypeVar

T = TypeVar("T")


def of(room: str, files: Sequence[str], kind: type[T]) -> dict[str, T]:
  """The entries of a room.

  Args:
    room: the package.
    files: its modules that declare entries, each as a variable of its own.
    kind: what an entry is an instance of.

  Returns:
    Each entry under its ``name``.
  """
  modules = [importlib.import_module(f"{room}.{file}") for file in files]
  entries: list[Any] = [
    value
    for module in modules
    for value in vars(module).values()
    if isinstance(value, kind)
  ]
  return {entry.name: entry for entry in entries}

"""Files that are written whole or not at all, and what wrote them."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import tempfile
from typing import Any, Callable, Iterator

import fsam_optax
from fsam_optax.experiments.common.flags import FlagError


def write_json(tree: Any, path: pathlib.Path) -> None:
  """Writes strict JSON, whole or not at all."""
  text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
  write(path, lambda file: file.write(text.encode()))


def finite(tree: Any) -> Any:
  """The tree with None for numbers that are not finite: JSON has none."""
  return json.loads(json.dumps(tree), parse_constant=lambda _: None)


def write(path: pathlib.Path, fill: Callable[[Any], object]) -> None:
  """Lets ``fill`` write into a binary file, which replaces that of the path.

  A process that is killed meanwhile leaves the old file as it was.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with temporary.open("wb") as file:
      fill(file)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def make_output(path: pathlib.Path) -> None:
  """Makes the directory of ``--output`` where it is missing.

  Raises:
    FlagError: if it cannot be written to.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
    raise FlagError(
      "--output",
      "must be a directory of this machine, got what reads as an address, "
      f"{str(path)!r}. Mount it, and name the directory",
    )
  with naming_output(path):
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass


@contextlib.contextmanager
def naming_output(path: pathlib.Path) -> Iterator[None]:
  """Makes an error of the file system one of ``--output``."""
  try:
    yield
  except OSError as error:
    raise FlagError(
      "--output",
      f"must be a directory that can be written to, got {str(path)!r} "
      f"({error.strerror or error}). Choose another",
    ) from error


def versions(*packages: str) -> dict[str, str]:
  """The versions of this package and of others, for a JSON to hold."""
  others = ("jax", "optax", "flax", "numpy", *packages)
  return {
    "fsam_optax": fsam_optax.__version__,
    **{name: importlib.metadata.version(name) for name in others},
  }

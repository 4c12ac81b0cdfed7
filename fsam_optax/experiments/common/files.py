"""Files that are written whole or not at all, and what wrote them."""

from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import tempfile
from typing import Any, Optional

import fsam_optax
from fsam_optax.experiments.common.flags import FlagError


def write_json(tree: Any, path: pathlib.Path) -> None:
  """Writes strict JSON, whole or not at all."""
  text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
  write(path, lambda file: file.write(text.encode()))


def write(path: pathlib.Path, fill: Callable[[Any], object]) -> None:
  """Writes a file, whole or not at all.

  A process that is killed meanwhile leaves the file of before.

  Args:
    path: of the file; its directory exists.
    fill: writes the content into a binary file.
  """
  temporary = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with temporary.open("wb") as file:
      fill(file)
    temporary.replace(path)
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def make_directory(path: pathlib.Path) -> Optional[str]:
  """Makes a directory where it is missing; what is wrong with it, or None."""
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
    return (
      "must be a directory of this machine, got what reads as an address, "
      f"{str(path)!r}. Mount it, and name the directory"
    )
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      return None
  except OSError as error:
    return (
      f"must be a directory that can be written to, got {str(path)!r} "
      f"({error.strerror or error}). Choose another"
    )


@contextlib.contextmanager
def saving(directory: pathlib.Path) -> Iterator[None]:
  """Makes one sentence of what goes wrong while results are written.

  To be entered when they have been printed, so that nothing is lost by it.

  Args:
    directory: what ``--output`` said.

  Raises:
    FlagError: if something cannot be written.
  """
  try:
    yield
  except OSError as error:
    raise FlagError(
      "--output",
      f"must be a directory that can be written to at the end, too, got "
      f"{str(directory)!r} ({error.strerror}). The results were printed above",
    ) from error


def versions(*packages: str) -> dict[str, str]:
  """The versions of this package and of others, for a JSON to hold."""
  others = ("jax", "optax", "flax", "numpy", *packages)
  return {
    "fsam_optax": fsam_optax.__version__,
    **{name: importlib.metadata.version(name) for name in others},
  }

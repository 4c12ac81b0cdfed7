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
  """Writes strict JSON, whole or not at all.

  Args:
    tree: of dictionaries, lists, strings and finite numbers.
    path: of the file.
  """
  text = json.dumps(tree, indent=1, allow_nan=False) + "\n"
  write(path, lambda file: file.write(text.encode()))


def write(path: pathlib.Path, fill: Callable[[Any], object]) -> None:
  """Writes a file, whole or not at all.

  A process that is killed meanwhile leaves the file of before.

  Args:
    path: of the file; its directory exists.
    fill: writes the content into a binary file.
  """
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}")
  try:
    with os.fdopen(handle, "wb") as file:
      fill(file)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(temporary, 0o666 & ~umask)  # mkstemp keeps it to its owner.
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def make_directory(path: pathlib.Path) -> Optional[str]:
  """Makes a directory to write to, where it is missing.

  Args:
    path: of the directory.

  Returns:
    None, or what must hold, what came and the remedy.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", str(path)):
    return (
      "must be a directory of this machine, got what reads as an address, "
      f"{str(path)!r}. Mount it, and name the directory"
    )
  if not _is_text(str(path)):
    return f"must be a path in UTF-8, got {str(path)!r}. Choose another"
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      return None
  except OSError as error:
    reason = os.strerror(error.errno) if error.errno else str(error)
    return (
      f"must be a directory that can be written to, got {str(path)!r} "
      f"({reason}). Choose another"
    )


def _is_text(path: str) -> bool:
  """Whether a path is UTF-8, as what writes checkpoints needs it."""
  try:
    path.encode()
    return True
  except UnicodeEncodeError:
    return False


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
  """The versions of this package and of others, for a JSON to hold.

  Args:
    *packages: names of distributions beside jax, optax, flax and numpy.

  Returns:
    Versions by name.
  """
  others = ("jax", "optax", "flax", "numpy", *packages)
  return {
    "fsam_optax": fsam_optax.__version__,
    **{name: importlib.metadata.version(name) for name in others},
  }

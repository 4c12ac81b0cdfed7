"""What a file may be and take, looked at before any of it is read."""

import os
import pathlib
import stat
from typing import Optional

from fsam_optax.experiments.data.images import DataError

_KINDS = {
  stat.S_IFDIR: "a folder",
  stat.S_IFIFO: "a pipe",
  stat.S_IFCHR: "a device",
  stat.S_IFBLK: "a device",
  stat.S_IFSOCK: "a socket",
}
# Of a container, version 2 and version 1: less than the machine has.
_LIMITS = (
  "/sys/fs/cgroup/memory.max",
  "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


def size_of(path: str, remedy: str = "") -> int:
  """The size of a regular file, which alone has an end that is known.

  Args:
    path: of the file; links are followed.
    remedy: the last sentence of the error.

  Returns:
    The size in bytes.

  Raises:
    DataError: if there is no such file, or it is a folder, a pipe, a device or
      a socket, of which the last three may never end.
  """
  after = f". {remedy}" if remedy else ""
  try:
    found = os.stat(path)
  except (OSError, ValueError) as error:  # A null byte in it.
    why = f" ({reason(error)})"
    if isinstance(error, FileNotFoundError):
      why = ", which is a link to nothing" if os.path.islink(path) else ""
    raise DataError(
      f"must be a file that exists, got {str(path)!r}{why}{after}"
    ) from error
  if not stat.S_ISREG(found.st_mode):
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
    raise DataError(
      f"must be a regular file, got {str(path)!r}, which is {kind}{after}"
    )
  return found.st_size


def reason(error: BaseException) -> str:
  """What an exception says, in one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return " ".join(str(error).split()) or type(error).__name__


def check_memory(needed: int, what: str, remedy: str) -> None:
  """Raises a DataError where so many bytes are not free.

  Args:
    needed: number of bytes.
    what: takes them, such as ``"the arrays of 'my.npz'"``.
    remedy: the last sentence of the error.
  """
  left = available_memory()
  if left is not None and needed > left:
    raise DataError(
      f"must fit into memory, {left / 2**30:,.1f} GiB, got {what}, "
      f"{needed / 2**30:,.1f} GiB. {remedy}"
    )


def available_memory() -> Optional[int]:
  """Bytes that can be taken without swapping; None where nobody knows.

  Linux counts what it caches of files as available, ``sysconf`` does not.
  """
  found = [_available_of_the_machine()]
  for path in _LIMITS:
    try:
      found.append(int(pathlib.Path(path).read_text()))
    except (OSError, ValueError):  # Not there, or "max".
      continue
  return min((n for n in found if n is not None), default=None)


def _available_of_the_machine() -> Optional[int]:
  try:
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
      if line.startswith("MemAvailable:"):
        return int(line.split()[1]) * 1024
  except (OSError, ValueError, IndexError):
    pass
  try:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):  # Not on every system.
    return None

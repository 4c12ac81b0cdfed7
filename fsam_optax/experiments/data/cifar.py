"""CIFAR-10 and CIFAR-100 from their binary version.

A record is one byte of label (CIFAR-100: a coarse and a fine one, of which the
fine one is the label and the coarse one its superclass) and 3,072 bytes of
image: 32 rows of 32 red values, then green, then blue
(`<https://www.cs.toronto.edu/~kriz/cifar.html>`_, which has the checksums of
the archives below, too). The files are read from a folder or, without
unpacking it, from the archive. The Python version is pickled and is refused: to
unpickle a file is to run what it says.
"""

from collections.abc import Callable
import gzip
import hashlib
import os
import pathlib
import tarfile
from typing import Any, NamedTuple
import zlib

import numpy as np

from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import entry
from fsam_optax.experiments.data.images import DataError
from fsam_optax.experiments.data.images import Images

_IMAGE = (3, 32, 32)
_IMAGE_BYTES = 3072
_RECORDS = 10_000
# What an archive may hold beside the records: a page, the names of classes.
_BESIDE = 2**20
# Of each channel in [0, 1], as the authors' script normalizes both.
_MEAN = (0.4914, 0.4822, 0.4465)
_STANDARD_DEVIATION = (0.2023, 0.1994, 0.2010)


class _Format(NamedTuple):
  """A published binary version: its files, with the records of each."""

  folder: str
  archive: str
  md5: str
  train: dict[str, int]
  test: dict[str, int]
  label_bytes: int
  classes: int

  @property
  def files(self) -> dict[str, int]:
    """The size in bytes of each file."""
    record = self.label_bytes + _IMAGE_BYTES
    return {name: n * record for name, n in {**self.train, **self.test}.items()}

  @property
  def pickles(self) -> set[str]:
    """The files of the Python version."""
    return {name.removesuffix(".bin") for name in self.files}


FORMATS = {
  "cifar10": _Format(
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    md5="c32a1d4ab5d03f1284b67883e8d87530",
    train={f"data_batch_{i}.bin": _RECORDS for i in range(1, 6)},
    test={"test_batch.bin": _RECORDS},
    label_bytes=1,
    classes=10,
  ),
  "cifar100": _Format(
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    md5="03b5dce01913d631647c71ecec9e9cb8",
    train={"train.bin": 5 * _RECORDS},
    test={"test.bin": _RECORDS},
    label_bytes=2,
    classes=100,
  ),
}


def load(name: str, path: str, *, check_sum: bool = True) -> Images:
  """Reads CIFAR-10 or CIFAR-100.

  Args:
    name: ``"cifar10"`` or ``"cifar100"``.
    path: the ``.tar.gz`` of the binary version, or a folder with its ``.bin``
      files or with the folder that it unpacks to.
    check_sum: whether an archive must have the published MD5. Files in a folder
      have none; their sizes are checked always.

  Returns:
    The images.

  Raises:
    DataError: if a file is missing, of another size, damaged or pickled.
    ValueError: if the name is unknown.
  """
  if name not in FORMATS:
    raise ValueError(
      f"`name` must be one of {', '.join(FORMATS)}, got {name!r}."
    )
  expected = FORMATS[name]
  source = pathlib.Path(path)
  remedy = f"Download {expected.archive} from www.cs.toronto.edu/~kriz"
  if os.path.isdir(source):
    read = _folder_reader(source, expected, remedy)
  else:
    _check_archive(source, expected, remedy, check_sum=check_sum)
    read = _archive_reader(source, expected, remedy)
  split = lambda files: _join(
    [_parse(file, read(file), n, expected, remedy) for file, n in files.items()]
  )
  x_train, y_train, coarse = split(expected.train)
  x_test, y_test, _ = split(expected.test)
  return Images(
    name=name,
    x_train=x_train,
    y_train=y_train,
    x_test=x_test,
    y_test=y_test,
    classes=expected.classes,
    noise_targets=(
      _CIFAR10_TARGETS
      if expected.label_bytes == 1
      else _next_of_superclass(y_train, coarse)
    ),
    mean=_MEAN,
    standard_deviation=_STANDARD_DEVIATION,
  )


def is_known(folder: pathlib.Path) -> bool:
  """Whether a folder holds a file of any of the versions, or such a folder."""
  names = {"cifar-10-batches-py", "cifar-100-python"}
  for expected in FORMATS.values():
    names |= {expected.folder, *expected.files, *expected.pickles}
  # Folders of images have these two names, pickles of CIFAR-100 as well.
  split = ("train", "test")
  return any(
    path.name in names and (path.name not in split or os.path.isfile(path))
    for path in (folder, *_in(folder))
  )


def _in(folder: pathlib.Path) -> list[pathlib.Path]:
  try:
    return sorted(folder.iterdir())
  except OSError as error:
    raise DataError(
      f"must be a folder that can be read, got {str(folder)!r} "
      f"({bounds.reason(error)})"
    ) from error


def _folder_reader(
  source: pathlib.Path, expected: _Format, remedy: str
) -> Callable[[str], bytes]:
  nested = source / expected.folder
  folder = nested if os.path.isdir(nested) else source
  present = {path.name for path in _in(folder)}
  if missing := sorted(expected.files.keys() - present):
    if any(os.path.isfile(folder / name) for name in expected.pickles) or any(
      path.name in ("cifar-10-batches-py", "cifar-100-python")
      for path in (source, *_in(source))
    ):
      raise _pickled(folder, remedy)
    raise DataError(
      f"must hold {', '.join(sorted(expected.files))}, got no "
      f"{', '.join(missing)} in {str(folder)!r}{_other(present, expected)}. "
      f"{remedy}"
    )

  def read(name):
    path = str(folder / name)
    _check_size(name, bounds.size_of(path, remedy), expected, remedy)
    try:
      with open(path, "rb") as file:
        # One more than it may have: it may have grown meanwhile.
        return file.read(expected.files[name] + 1)
    except OSError as error:
      raise DataError(
        f"must hold files that can be read, got {path!r} "
        f"({bounds.reason(error)}). {remedy}"
      ) from error

  return read


def _other(present: set[str], expected: _Format) -> str:
  """What else the files are, as the end of a clause."""
  for name, other in FORMATS.items():
    if other is not expected and (
      other.folder in present or not other.files.keys() - present
    ):
      return f", which has those of {name}"
  return ""


class _Unpacked:
  """The content of an archive, of which no more is unpacked than may be."""

  def __init__(self, file: Any, most: int) -> None:
    self._file, self._left, self._most = file, most, most

  def read(self, size: int) -> bytes:
    content = self._file.read(min(size, self._left + 1))
    self._left -= len(content)
    if self._left < 0:
      raise tarfile.ReadError(f"it unpacks to more than {self._most:,} bytes")
    return content


def _most(expected: _Format) -> int:
  """The bytes that an archive has at most, unpacked or not."""
  return sum(expected.files.values()) + _BESIDE


def _archive_reader(
  source: pathlib.Path, expected: _Format, remedy: str
) -> Callable[[str], bytes]:
  try:
    with source.open("rb") as file:
      is_packed = file.read(2) == b"\x1f\x8b"
    with gzip.open(source) if is_packed else source.open("rb") as file:
      unpacked: Any = _Unpacked(file, _most(expected))
      with tarfile.open(fileobj=unpacked, mode="r|", bufsize=2**18) as archive:
        found = _members(archive, expected, remedy)
      while unpacked.read(2**18):  # At its end the checksum is compared.
        pass
  except (
    tarfile.TarError,
    EOFError,
    OSError,
    zlib.error,
    ValueError,  # Numbers in a header that are none.
    OverflowError,
    MemoryError,
    RecursionError,
  ) as error:
    if isinstance(error, DataError):
      raise
    raise DataError(
      f"must be an archive that can be read, got {str(source)!r}, which is "
      f"truncated or damaged ({bounds.reason(error)}). {remedy} again"
    ) from error
  if missing := sorted(expected.files.keys() - found.keys()):
    raise DataError(
      f"must hold {', '.join(sorted(expected.files))}, got no "
      f"{', '.join(missing)} in {str(source)!r}. {remedy}"
    )
  return found.__getitem__


def _members(
  archive: tarfile.TarFile, expected: _Format, remedy: str
) -> dict[str, bytes]:
  found: dict[str, bytes] = {}
  for member in archive:
    # Where the next begins: to get there is to read until there, even after
    # the end of the file.
    if archive.offset > _most(expected):
      raise tarfile.ReadError(f"a member claims {member.size:,} bytes")
    name = pathlib.PurePosixPath(member.name).name
    if not member.isreg() or name not in expected.files:
      continue
    if name in found:
      raise DataError(f"must hold one {name}, got two. {remedy}")
    _check_size(name, member.size, expected, remedy)
    file = archive.extractfile(member)
    assert file is not None  # It is a file.
    found[name] = file.read()
  return found


def _check_size(name: str, size: int, expected: _Format, remedy: str) -> None:
  record = expected.label_bytes + _IMAGE_BYTES
  if size != expected.files[name]:
    raise DataError(
      f"must hold {name} with {expected.files[name] // record:,} records of "
      f"{record:,} bytes, {expected.files[name]:,}, got {size:,} bytes: it is "
      f"truncated or another file. {remedy} again"
    )


def _parse(
  name: str, content: bytes, records: int, expected: _Format, remedy: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  record = expected.label_bytes + _IMAGE_BYTES
  _check_size(name, len(content), expected, remedy)
  table = np.frombuffer(content, np.uint8).reshape(records, record)
  labels = table[:, expected.label_bytes - 1].astype(np.int32)
  if labels.max() >= expected.classes:
    row = int(np.argmax(labels >= expected.classes))
    raise DataError(
      f"must hold labels below {expected.classes} in {name}, got "
      f"{labels[row]} at record {row}: it is damaged or another file. {remedy} "
      "again"
    )
  images = table[:, expected.label_bytes :].reshape(records, *_IMAGE)
  # The first byte: the coarse label, or the only one.
  return np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels, table[:, 0]


def _join(parts: list[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
  return [np.concatenate(columns) for columns in zip(*parts, strict=True)]


# Of CIFAR-10: truck to automobile, bird to airplane, deer to horse, cat and dog
# to each other, the classes that Patrini et al.
# (https://arxiv.org/abs/1609.03683) confuse, as the authors of F-SAM do.
_CIFAR10_TARGETS = np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1], np.int32)


def _next_of_superclass(fine: np.ndarray, coarse: np.ndarray) -> np.ndarray:
  """The next class of the same superclass, and the first after the last."""
  targets = np.arange(fine.max() + 1, dtype=np.int32)
  for label in np.unique(coarse):
    members = np.unique(fine[coarse == label])
    targets[members] = np.roll(members, -1)
  return targets


# Of the archives of the Python version.
_PICKLED_MD5 = (
  "c58f30108f718f92721af3b95e74349a",
  "eb9058c3a382ffc7106e4002c42a8d85",
)


def _check_archive(
  source: pathlib.Path, expected: _Format, remedy: str, *, check_sum: bool
) -> None:
  """Raises unless the size of an archive, and its MD5, are those expected."""
  size = bounds.size_of(str(source), remedy)
  most = _most(expected)
  if size > most:
    if "python" in source.name:
      raise _pickled(source, remedy)
    raise DataError(
      f"must be {expected.archive}, which has {most:,} bytes at most, got "
      f"{str(source)!r} of {size:,}. {remedy}"
    )
  if not check_sum:
    return
  try:
    with source.open("rb") as file:
      found = hashlib.file_digest(file, "md5").hexdigest()
  except OSError as error:
    raise DataError(
      f"must be a file that can be read, got {str(source)!r} "
      f"({bounds.reason(error)}). {remedy}"
    ) from error
  if found in _PICKLED_MD5 or (
    found != expected.md5 and "python" in source.name
  ):
    raise _pickled(source, remedy)
  if found != expected.md5:
    raise DataError(
      f"must be {expected.archive} with the MD5 {expected.md5}, got "
      f"{str(source)!r} with {found}: it is truncated, damaged or another "
      f"file. {remedy} again, or unpack it and hand over the folder"
    )


def _pickled(source: pathlib.Path, remedy: str) -> DataError:
  return DataError(
    f"must be the binary version, got the Python version at {str(source)!r}, "
    "which is pickled: to unpickle a file is to run what it says. "
    f"{remedy} instead"
  )


def _entry(name: str, about: str) -> entry.DataSet:
  expected = FORMATS[name]
  return entry.DataSet(
    name=name,
    about=about,
    read=lambda path, size: load(name, str(path)).resized(size),
    takes_path=True,
    sizes=entry.Sizes(
      sum(expected.train.values()),
      sum(expected.test.values()),
      (32, 32, 3),
      expected.classes,
    ),
  )


ENTRIES = (
  _entry("cifar10", "CIFAR-10, its binary version"),
  _entry("cifar100", "CIFAR-100, its binary version"),
)

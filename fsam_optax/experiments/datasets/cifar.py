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
import hashlib
import pathlib
import tarfile
from typing import NamedTuple
import zlib

import numpy as np

from fsam_optax.experiments.datasets import entry
from fsam_optax.experiments.datasets.images import DataError
from fsam_optax.experiments.datasets.images import Images

_IMAGE = (3, 32, 32)
_IMAGE_BYTES = 3072
_RECORDS = 10_000
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
  if "python" in source.name or "-py" in source.name:
    raise _pickled(source, remedy)
  if source.is_dir():
    read = _folder_reader(source, expected, remedy)
  elif source.is_file():
    if check_sum:
      _check_md5(source, expected, remedy)
    read = _archive_reader(source, expected, remedy)
  else:
    raise DataError(
      f"must be a folder or an archive that exists, got {path!r}. {remedy}"
    )
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


def _folder_reader(
  source: pathlib.Path, expected: _Format, remedy: str
) -> Callable[[str], bytes]:
  nested = source / expected.folder
  folder = nested if nested.is_dir() else source
  names = {*expected.train, *expected.test}
  present = {path.name for path in folder.iterdir()}
  if missing := sorted(names - present):
    pickles = {name.removesuffix(".bin") for name in names} & present
    if pickles or any(path.name.endswith("-py") for path in source.iterdir()):
      raise _pickled(folder, remedy)
    raise DataError(
      f"must hold {', '.join(sorted(names))}, got no {', '.join(missing)} in "
      f"{str(folder)!r}. {remedy}"
    )

  def read(name):
    try:
      return (folder / name).read_bytes()
    except OSError as error:
      raise DataError(
        f"must hold files that can be read, got {str(folder / name)!r} "
        f"({error.strerror}). {remedy}"
      ) from error

  return read


def _archive_reader(
  source: pathlib.Path, expected: _Format, remedy: str
) -> Callable[[str], bytes]:
  wanted = {*expected.train, *expected.test}
  found: dict[str, bytes] = {}
  try:
    with tarfile.open(source, "r:*") as archive:
      for member in archive:
        name = pathlib.PurePosixPath(member.name).name
        if not member.isfile() or name not in wanted:
          continue
        file = archive.extractfile(member)
        assert file is not None  # It is a file.
        found[name] = file.read()
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise DataError(
      f"must be an archive that can be read, got {str(source)!r}, which is "
      f"truncated or damaged ({error}). {remedy} again"
    ) from error
  if missing := sorted(wanted - found.keys()):
    raise DataError(
      f"must hold {', '.join(sorted(wanted))}, got no {', '.join(missing)} in "
      f"{str(source)!r}. {remedy}"
    )
  return found.__getitem__


def _parse(
  name: str, content: bytes, records: int, expected: _Format, remedy: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  record = expected.label_bytes + _IMAGE_BYTES
  if len(content) != records * record:
    raise DataError(
      f"must hold {name} with {records:,} records of {record:,} bytes, "
      f"{records * record:,}, got {len(content):,} bytes: it is truncated or "
      f"another file. {remedy} again"
    )
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


def _check_md5(source: pathlib.Path, expected: _Format, remedy: str) -> None:
  try:
    with source.open("rb") as file:
      found = hashlib.file_digest(file, "md5").hexdigest()
  except OSError as error:
    raise DataError(
      f"must be a file that can be read, got {str(source)!r} "
      f"({error.strerror})."
    ) from error
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

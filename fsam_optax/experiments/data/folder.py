"""A folder of image files, in one subfolder a class."""

from collections.abc import Callable
from collections.abc import Iterable
import concurrent.futures
import math
import os
import pathlib
from typing import Optional
import warnings

import numpy as np

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import entry
from fsam_optax.experiments.data import pictures
from fsam_optax.experiments.data.images import DataError
from fsam_optax.experiments.data.images import Images

TEST_FOLDERS = ("test", "val", "validation")
_SHOWN = 5


def is_image_folder(path: str) -> bool:
  """Whether a path is a folder with a subfolder ``train``."""
  return os.path.isdir(os.path.join(path, "train"))


def load(path: str, size: Optional[int] = None) -> Images:
  """Reads images from files in one subfolder a class.

  Nothing that is there is left out unsaid: what is neither hidden nor an image
  of a class is an error, be it a folder inside of a class, whose images might
  be of that class or of one below it, a link to nothing, of which nobody knows
  what is missing, or an image beside the classes. Other files beside the
  classes, such as a list of labels, are passed over, as hidden ones are.

  Args:
    path: a folder with ``train`` and ``test`` (or ``val``, ``validation``) in
      it, and in each a subfolder of images for every class.
    size: side in pixels. The images are scaled until the shorter side fits,
      and the middle of the longer one is taken. None where all have one size.

  Returns:
    The images, in RGB, with the classes in the order of their names. For
    images of more than 8 bits a channel see
    :func:`fsam_optax.experiments.data.pictures.read`.

  Raises:
    DataError: if a folder is missing or empty, or a file cannot be read or has
      another size; names it.
    MissingExtraError: if Pillow is not installed.
  """
  extras.require("PIL.Image")
  root = pathlib.Path(path)
  _check_links(root, visible(root))
  classes = _classes(root / "train")
  if len(classes) < 2:
    raise DataError(
      "must hold a subfolder for each class in train, two at least, got "
      f"{len(classes)} in {str(root / 'train')!r}"
    )
  train = _files(root / "train", classes)
  test = _files(_test_folder(root), classes)
  with warnings.catch_warnings():
    # What Pillow remarks on metadata, and on sizes that are refused later.
    # Around the threads, not inside of each: the filters are those of all.
    warnings.simplefilter("ignore")
    shape = (size, size, 3) if size else _shape_of(train[0][0])
    number = len(train) + len(test)
    _check_memory(number, shape, path)
    advance = progress.lines(f"reading the images in {printable(path)}", number)
    files = lambda labeled: [file for file, _ in labeled]
    x_train, reduced = _read_all(files(train), shape, size, advance)
    x_test, also = _read_all(files(test), shape, size, advance)
  return Images(
    printable(path),
    x_train,
    np.array([label for _, label in train], np.int32),
    x_test,
    np.array([label for _, label in test], np.int32),
    len(classes),
    notes=_notes(reduced + also, number),
  )


def shown(names: Iterable[str]) -> str:
  """The first of some names, with the number of the others."""
  names = list(names)
  more = len(names) - _SHOWN
  listed = ", ".join(map(repr, names[:_SHOWN]))
  return f"{listed} and {more:,} more" if more > 0 else listed


def visible(folder: pathlib.Path) -> list[pathlib.Path]:
  """What is in a folder, but for what is hidden, sorted by name.

  Raises:
    DataError: if it cannot be listed.
  """
  try:
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))
  except OSError as error:
    raise DataError(
      f"must be a folder that can be read, got {str(folder)!r} "
      f"({bounds.reason(error)}). Hand over one with train/CLASS/ and "
      "test/CLASS/"
    ) from error


def _notes(reduced: int, files: int) -> tuple[str, ...]:
  if not reduced:
    return ()
  return (
    f"{reduced:,} of {files:,} images have 16 bits a channel, of which the "
    "upper 8 are taken",
  )


def _check_links(folder: pathlib.Path, paths: list[pathlib.Path]) -> None:
  if dead := [
    p.name for p in paths if p.is_symlink() and not os.path.exists(p)
  ]:
    raise DataError(
      f"must hold links to what is there, got {len(dead)} to nothing in "
      f"{str(folder)!r}: {shown(dead)}. Restore what they point to, or take "
      "them away"
    )


def _classes(folder: pathlib.Path) -> list[str]:
  """The names of the subfolders, beside which there is no image."""
  paths = visible(folder)
  _check_links(folder, paths)
  images = [p.name for p in paths if _is_image(p)]
  names = [p.name for p in paths if os.path.isdir(p)]
  if images:
    raise DataError(
      f"must hold its images in a subfolder for each class, got {len(images)} "
      f"beside {len(names)} subfolders in {str(folder)!r}: {shown(images)}. "
      "Move them into their classes or take them away"
    )
  return names


def _is_image(path: pathlib.Path) -> bool:
  return path.suffix.lower() in pictures.SUFFIXES and os.path.isfile(path)


def _test_folder(root: pathlib.Path) -> pathlib.Path:
  found = [root / name for name in TEST_FOLDERS if os.path.isdir(root / name)]
  if not found:
    others = [p.name for p in visible(root) if p.name != "train"]
    raise DataError(
      f"must hold a folder test beside train, got none in {str(root)!r}"
      f"{', but ' + shown(others) if others else ''}. Name it "
      "test, val or validation"
    )
  is_labeled = [any(os.path.isdir(p) for p in visible(path)) for path in found]
  if not is_labeled[0]:
    inside = len(visible(found[0]))
    remedy = "Sort its images into one for each class"
    if any(is_labeled):
      name = found[is_labeled.index(True)].name
      remedy = (
        f"To test on {name!r}, which has subfolders, take "
        f"{found[0].name!r} away"
      )
    raise DataError(
      f"must hold images in a subfolder for each class, got none in "
      f"{str(found[0])!r}, but {inside:,} files without a class. {remedy}"
    )
  return found[0]


def _files(
  folder: pathlib.Path, names: list[str]
) -> list[tuple[pathlib.Path, int]]:
  present = _classes(folder)
  if unknown := sorted(set(present) - set(names)):
    raise DataError(
      f"must hold the classes of train in {str(folder)!r}, got "
      f"{shown(unknown)}, which train does not have"
    )
  found = []
  for label, name in enumerate(names):
    if name in present:
      found += [(file, label) for file in _images_of(folder / name)]
  return found


def _images_of(folder: pathlib.Path) -> list[pathlib.Path]:
  """The files of a class, which has nothing else."""
  paths = visible(folder)
  _check_links(folder, paths)
  if others := [p.name for p in paths if not os.path.isfile(p)]:
    raise DataError(
      f"must hold images alone in the folder of a class, got {len(others)} "
      f"folders or the like in {str(folder)!r}: {shown(others)}. Move their "
      "images up, or take them away"
    )
  if not paths:
    raise DataError(
      f"must hold images of every class, got none in {str(folder)!r}"
    )
  return paths


def _shape_of(file: pathlib.Path) -> tuple[int, int, int]:
  height, width, channels = pictures.read(file).pixels.shape
  return height, width, channels


def _check_memory(rows: int, shape: tuple[int, int, int], path: str) -> None:
  bounds.check_memory(
    rows * math.prod(shape),
    f"{rows:,} images of {list(shape)} in {path!r}",
    "Choose a smaller --image-size",
  )


def _read_all(
  files: list[pathlib.Path],
  shape: tuple[int, int, int],
  size: Optional[int],
  advance: Callable[[], None],
) -> tuple[np.ndarray, int]:
  """The images, and how many of them had more than 8 bits."""
  images = np.empty((len(files), *shape), np.uint8)

  def read(i):
    image, is_reduced = pictures.read(files[i], size)
    if image.shape != shape:
      raise DataError(
        f"must hold images of one size, got {str(files[i])!r} of "
        f"{image.shape[0]} x {image.shape[1]} pixels, and others of "
        f"{shape[0]} x {shape[1]}. Scale them: --image-size {min(shape[:2])}"
      )
    images[i] = image
    return is_reduced

  # Pillow decodes without Python's lock.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    try:
      total = 0
      for is_reduced in pool.map(read, range(len(files))):
        total += is_reduced
        advance()
      return images, total
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


ENTRY = entry.DataSet(
  name="folder",
  about="a folder of images with train/CLASS/ and test/CLASS/",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  recognizes=is_image_folder,
)

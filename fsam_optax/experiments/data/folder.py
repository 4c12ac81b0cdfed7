"""A folder of image files, in one subfolder a class."""

import concurrent.futures
import os
import pathlib
from typing import Any, Optional
import warnings

import numpy as np

from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import images

# Pillow would choose among all that it has by the first bytes, not the name: an
# EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
_SUFFIXES = {
  *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
  *(".ppm", ".pgm", ".pbm", ".pnm"),
}
_EIGHT_BITS = {
  *("1", "L", "LA", "La", "P", "PA"),
  *("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"),
}
_BITS_PER_SAMPLE = 258  # A tag of TIFF.
_TESTS = ("test", "val", "validation")


def load(path: str, size: Optional[int] = None) -> images.Images:
  """Reads images in RGB, the classes in the order of their names.

  Whatever is in the folder of a class must be an image, and no image may lie
  beside the classes. Hidden files are passed over.

  Args:
    path: a folder with ``train`` and ``test`` (or ``val``, ``validation``) in
      it, and in each a subfolder of images for every class.
    size: side in pixels. The images are scaled until the shorter side fits,
      and the middle of the longer one is taken. None where all have one size.
  """
  root = pathlib.Path(path)
  tests = [root / name for name in _TESTS if (root / name).is_dir()]
  if not tests or not (root / "train").is_dir():
    raise images.DataError(
      "must hold a folder train and beside it one of the name test, val or "
      f"validation, got {path!r}"
    )
  classes = _classes(root / "train")
  if unknown := sorted({*_classes(tests[0], least=1)} - {*classes}):
    raise images.DataError(
      f"must hold the classes of train in {str(tests[0])!r}, got "
      f"{', '.join(unknown)}, which train does not have"
    )
  train, y_train = _files(root / "train", classes)
  test, y_test = _files(tests[0], classes)
  files = [*train, *test]
  with warnings.catch_warnings():
    # What Pillow remarks on metadata. Around the threads, not inside of each:
    # the filters are those of all.
    warnings.simplefilter("ignore")
    first = read(files[0], size)
    pixels = np.empty((len(files), *first.shape), np.uint8)

    def fill(i):
      pixels[i] = read(files[i], size, first.shape)

    # Pillow decodes without Python's lock.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      list(pool.map(fill, range(len(files))))
  x_train, x_test = np.split(pixels, [len(train)])
  return images.Images(
    *(printable(path), x_train, y_train, x_test, y_test, len(classes))
  )


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _classes(folder: pathlib.Path, least: int = 2) -> list[str]:
  """The names of the subfolders, beside which there is no image."""
  names = [p.name for p in _visible(folder) if p.is_dir()]
  beside = [p for p in _visible(folder) if p.name not in names]
  stray = [p.name for p in beside if p.suffix.lower() in _SUFFIXES]
  if stray or len(names) < least:
    raise images.DataError(
      f"must hold its images in a subfolder for each class, at least {least}, "
      f"got {len(names)} subfolders in {str(folder)!r} and beside them "
      f"the images {stray[:5]}. Move them into their classes or take them away"
    )
  return names


def _files(
  folder: pathlib.Path, classes: list[str]
) -> tuple[list[pathlib.Path], np.ndarray]:
  """The files of all classes, with the number of the class of each."""
  files, numbers = [], []
  for number, name in enumerate(classes):
    if not (folder / name).is_dir():
      continue  # Of a class there may be no test rows.
    found = _visible(folder / name)
    if not found:
      raise images.DataError(
        f"must hold images in the folder of a class, got none in "
        f"{str(folder / name)!r}. Take it away"
      )
    files += found
    numbers += [number] * len(found)
  return files, np.array(numbers, np.int32)


def read(
  file: pathlib.Path,
  size: Optional[int] = None,
  shape: Optional[tuple[int, ...]] = None,
) -> np.ndarray:
  """Reads an image in RGB, of 8 bits.

  Its EXIF orientation is applied. Of 16 bits a channel the upper 8 are taken,
  as Pillow does where they are in color. Transparency is dropped. Of several
  frames the first is taken.
  """
  from PIL import Image
  from PIL import ImageOps

  try:
    with Image.open(file, formats=_FORMATS) as image:
      _check_bits(file, image)
      image = ImageOps.exif_transpose(image)
      if image.mode not in _EIGHT_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      image = image.convert("RGB")
      if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
      pixels = np.asarray(image)
  except images.DataError:
    raise
  # The decoders have a dozen ways to say that a file is damaged; none of them
  # is this program's mistake.
  except Exception as error:
    raise images.DataError(
      f"must hold images alone, of {', '.join(_FORMATS)}, got {str(file)!r}, "
      f"which cannot be read as one ({images.reason(error)}). Repair it or "
      "take it away"
    ) from error
  if shape and pixels.shape != shape:
    raise images.DataError(
      f"must hold images of one size, got {str(file)!r} of {pixels.shape[0]} x "
      f"{pixels.shape[1]} pixels, and others of {shape[0]} x {shape[1]}. Scale "
      f"them: --image-size {min(shape[:2])}"
    )
  return pixels


def _check_bits(file: pathlib.Path, image: Any) -> None:
  """Raises unless a file, which is not decoded yet, has 8 or 16 a channel."""
  bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
  # Such a PPM, and of an older Pillow such a PNG, is widened to 32 bits.
  is_widened = image.mode == "I" and image.format in ("PNG", "PPM")
  is_wide = image.mode.startswith("I;16") or is_widened
  if image.mode not in _EIGHT_BITS and not (is_wide and {*bits} == {16}):
    raise images.DataError(
      "must hold images of 8 or 16 bits a channel, gray or in color, got "
      f"{str(file)!r} of the mode {image.mode}. Convert it to 8 bits with its "
      "white at 255, or put the images into an .npz"
    )


ENTRY = images.DataSet(
  name="folder",
  about="a folder of images with train/CLASS/ and test/CLASS/",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  # Not by pathlib, which raises where a name is too long.
  recognizes=lambda path: os.path.isdir(os.path.join(path, "train")),
)

"""One image file: what is in it, whoever wrote it."""

import pathlib
from typing import Any, NamedTuple, Optional

import numpy as np

from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data.images import DataError

# Pillow would choose among all that it has by the first bytes, not the name: an
# EPS runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")
SUFFIXES = {
  *(".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"),
  *(".ppm", ".pgm", ".pbm", ".pnm"),
}
_EIGHT_BITS = {
  *("1", "L", "LA", "La", "P", "PA"),
  *("RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"),
}
_SIXTEEN_BITS = {"I;16", "I;16B", "I;16L", "I;16N"}
_BITS_PER_SAMPLE = 258  # A tag of TIFF.


class Picture(NamedTuple):
  """An image that was read.

  Attributes:
    pixels: shape ``[H, W, 3]``, uint8.
    is_reduced: whether the file has 16 bits a channel.
  """

  pixels: np.ndarray
  is_reduced: bool


def read(file: pathlib.Path, size: Optional[int] = None) -> Picture:
  """Reads an image in RGB, of 8 bits.

  Its EXIF orientation is applied. Of 16 bits a channel the upper 8 are taken,
  as Pillow does where they are in color. Transparency is dropped. Of several
  frames the first is taken.

  Args:
    file: JPEG, PNG, WebP, TIFF, BMP, GIF or PPM.
    size: side in pixels. The image is scaled until the shorter side fits, and
      the middle of the longer one is taken. None to leave it.

  Returns:
    The image.

  Raises:
    DataError: if it cannot be read, has more pixels than
      ``PIL.Image.MAX_IMAGE_PIXELS``, or more than 16 bits a channel; names it.
  """
  from PIL import Image
  from PIL import ImageOps

  bounds.size_of(str(file), "Repair it or take it away")
  try:
    with Image.open(file, formats=_FORMATS) as image:
      _check_pixels(file, image, Image.MAX_IMAGE_PIXELS)
      _check_mode(file, image)
      is_reduced = _has_sixteen_bits(image)
      image = ImageOps.exif_transpose(image)
      if image.mode not in _EIGHT_BITS:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
      image = image.convert("RGB")
      if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
      return Picture(np.asarray(image), is_reduced)
  except DataError:
    raise
  # The decoders have a dozen ways to say that a file is damaged; none of them
  # is this program's mistake.
  except Exception as error:
    why = bounds.reason(error)
    if isinstance(error, Image.UnidentifiedImageError):
      formats = ", ".join(_FORMATS)
      why = f"it is none of {formats}, or of a kind that Pillow does not read"
    raise DataError(
      f"must hold images alone, got {str(file)!r}, which cannot be read as one "
      f"({why}). Repair it or take it away"
    ) from error


def _check_pixels(file: pathlib.Path, image: Any, most: Optional[int]) -> None:
  width, height = image.size
  if most is not None and width * height > most:
    raise DataError(
      f"must hold images of {most:,} pixels at most, got {str(file)!r}, which "
      f"claims {height:,} x {width:,}. Make it smaller or take it away"
    )


def _check_mode(file: pathlib.Path, image: Any) -> None:
  bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
  if image.mode in _EIGHT_BITS or (
    _is_gray_of_sixteen_bits(image) and set(bits) == {16}
  ):
    return
  about = {"F": " (floating point)", "I": " (32 bits)"}.get(image.mode, "")
  raise DataError(
    "must hold images of 8 or 16 bits a channel, gray or in color, got "
    f"{str(file)!r} of the mode {image.mode}{about}. Convert it to 8 bits with "
    "its white at 255, or put the images into an .npz"
  )


def _is_gray_of_sixteen_bits(image: Any) -> bool:
  # Such a PPM, and of an older Pillow such a PNG, is widened to 32 bits.
  is_widened = image.mode == "I" and image.format in ("PNG", "PPM")
  return image.mode in _SIXTEEN_BITS or is_widened


def _has_sixteen_bits(image: Any) -> bool:
  """Whether a file, which is not decoded yet, has so many in a channel."""
  # In color Pillow gives 8, and only the name of the layout tells: "RGB;16B".
  layout = str(image.tile)
  return _is_gray_of_sixteen_bits(image) or (
    ";16" in layout and "BGR" not in layout
  )

"""What every data set is: images with their labels."""

import hashlib
from typing import NamedTuple, Optional

import numpy as np

from fsam_optax.experiments.common.terminal import printable


class DataError(ValueError):
  """Data that are not what they must be.

  Its sentence begins with "must", or names an array first: a command puts its
  flag in front. It is one line, without control characters.
  """

  def __init__(self, message: object) -> None:
    """Writes out what a terminal might obey."""
    super().__init__(printable(str(message)))


class Images(NamedTuple):
  """Images with their labels, to train on and to test on.

  The same name stands for the same images, rows and scale in every command.

  Attributes:
    name: what they are called.
    x_train: shape ``[N, H, W, C]``, uint8 up to 255 or float32; of an .npz also
      vectors ``[N, features]``, and float64 where it takes that to hold them.
    y_train: shape ``[N]``, int32, in ``[0, classes)``.
    x_test: shape ``[M, H, W, C]``.
    y_test: shape ``[M]``, int32.
    classes: number of classes.
    noise_targets: the class that asymmetric label noise makes of each, shape
      ``[classes]``, int32; None for the next one, the first after the last.
    mean: published mean of each channel of images scaled to [0, 1]; None where
      none is.
    standard_deviation: published, as the mean is.
    source_rows: the place of each row, those of ``x_train`` first, in a source
      that has no test rows of its own, shape ``[N + M]``; None where it has.
    white: 255 where floating numbers are the means of such of uint8, and so on
      their scale; None otherwise.
    notes: what a reader made of its files that one may want to know, a sentence
      each; a command prints them.
  """

  name: str
  x_train: np.ndarray
  y_train: np.ndarray
  x_test: np.ndarray
  y_test: np.ndarray
  classes: int
  noise_targets: Optional[np.ndarray] = None
  mean: Optional[tuple[float, ...]] = None
  standard_deviation: Optional[tuple[float, ...]] = None
  source_rows: Optional[np.ndarray] = None
  white: Optional[int] = None
  notes: tuple[str, ...] = ()

  @property
  def image_shape(self) -> Optional[tuple[int, int, int]]:
    """Height, width and channels; None where the rows are vectors."""
    shape = self.x_train.shape[1:]
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None

  def fingerprint(self) -> str:
    """The SHA-256 of all pixels and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (self.x_train, self.y_train, self.x_test, self.y_test):
      digest.update(f"{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def resized(self, size: Optional[int]) -> "Images":
    """Makes the images smaller, each pixel the mean of a square block.

    Args:
      size: side in pixels, a divisor of both sides; None to leave them.

    Returns:
      The images on the scale of before, in float32, or in float64 where they
      were so.

    Raises:
      DataError: if the rows are vectors, or the size is no divisor.
    """
    shape = self.image_shape
    if size is None or (shape is not None and shape[:2] == (size, size)):
      return self
    if shape is None:
      raise DataError(
        "must hold images where an --image-size is given, got rows of "
        f"{self.x_train.shape[1]} features. Leave it out"
      )
    height, width, channels = shape
    if height != width or height % size:
      raise DataError(
        f"must hold images that --image-size {size} divides, got {height} x "
        f"{width} pixels"
      )
    block = height // size
    mean = lambda x: (
      x.reshape(len(x), size, block, size, block, channels)
      .mean(axis=(2, 4))
      .astype(np.float64 if x.dtype == np.float64 else np.float32)
    )
    return self._replace(
      x_train=mean(self.x_train),
      x_test=mean(self.x_test),
      white=255 if self.x_train.dtype == np.uint8 else self.white,
    )


def drawn(
  name: str, x: np.ndarray, y: np.ndarray, *, classes: int, test: int
) -> Images:
  """Divides a source without test rows of its own, in the same way always.

  Args:
    name: of the data set.
    x: all images, shape ``[N, H, W, C]``.
    y: their labels.
    classes: number of classes.
    test: how many rows are for the test.

  Returns:
    The images.
  """
  order = np.random.default_rng(0).permutation(len(y))
  y = np.asarray(y, np.int32)
  train = order[test:]
  test_rows = order[:test]
  return Images(
    name,
    x[train],
    y[train],
    x[test_rows],
    y[test_rows],
    classes,
    source_rows=np.concatenate([train, test_rows]),
  )

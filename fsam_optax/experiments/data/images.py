"""What every data set is: images with their labels, and how they are read."""

import hashlib
from typing import Callable, NamedTuple, Optional

import numpy as np

from fsam_optax.experiments.common.terminal import printable

_VALUES_AT_A_TIME = 2**22


class DataError(ValueError):
  """Data that are not what they must be: a sentence to follow a flag."""

  def __init__(self, message: object) -> None:
    super().__init__(printable(message))


def reason(error: BaseException) -> str:
  """What an exception says, in one line."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return " ".join(str(error).split()) or type(error).__name__


class Images(NamedTuple):
  """Images with their labels, to train on and to test on.

  The same name stands for the same images, rows and scale in every command.

  Attributes:
    name: what they are called.
    x_train: shape ``[N, H, W, C]``, uint8 up to 255 or float32; of an .npz also
      vectors ``[N, features]``.
    y_train: shape ``[N]``, int32, in ``[0, classes)``.
    x_test: shape ``[M, H, W, C]``.
    y_test: shape ``[M]``, int32.
    classes: number of classes.
    noise_targets: the class that asymmetric label noise makes of each, shape
      ``[classes]``, int32; None for the next one, the first after the last.
    mean: published mean of each channel of images scaled to [0, 1].
    standard_deviation: published, as the mean is.
    source_rows: the place of each row, those of ``x_train`` first, in a source
      that has no test rows of its own, shape ``[N + M]``; None where it has.
    white: 255 where floating numbers are means of uint8, on their scale.
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

  def fingerprint(self) -> str:
    """The SHA-256 of all pixels and labels, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (self.x_train, self.y_train, self.x_test, self.y_test):
      digest.update(f"{array.dtype}{array.shape}".encode())
      digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

  def moments(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, published or measured.

    Those of uint8 are of the images in [0, 1].
    """
    x = self.x_train
    is_integer = x.dtype == np.uint8
    if is_integer and self.mean and self.standard_deviation:
      return self.mean, self.standard_deviation
    mean, deviation = moments(x, 255 if is_integer else 1)
    return tuple(mean.tolist()), tuple(deviation.tolist())

  def resized(self, size: Optional[int]) -> "Images":
    """Smaller images of ``size x size``, each pixel the mean of a block.

    They keep their scale, in float32. None leaves them as they are.

    Raises:
      DataError: if the rows are vectors, or the size does not divide the sides.
    """
    shape = self.x_train.shape[1:]
    if size is None or shape[:2] == (size, size):
      return self
    if len(shape) < 3 or shape[0] != shape[1] or shape[0] % size:
      raise DataError(
        f"must hold square images that --image-size {size} divides, got rows "
        f"of shape {list(shape)}"
      )
    block, channels = shape[0] // size, shape[2]
    mean = lambda x: (
      x.reshape(len(x), size, block, size, block, channels)
      .mean(axis=(2, 4))
      .astype(np.float32)
    )
    return self._replace(
      x_train=mean(self.x_train),
      x_test=mean(self.x_test),
      white=255 if self.x_train.dtype == np.uint8 else self.white,
    )


def moments(x: np.ndarray, scale: float = 1) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of the channels of ``x / scale``, float64.

  Shape ``[C]`` of inputs ``[N, ..., C]``. The deviation is 1 where it is 0, or
  too small for float32.
  """
  axes = tuple(range(x.ndim - 1))
  # A part of the rows at a time, or uint8 would need nine times its memory.
  rows = max(1, _VALUES_AT_A_TIME // x[0].size)
  parts = [x[i : i + rows] for i in range(0, len(x), rows)]
  low = x.min(axes)
  number = x.size // low.size
  sums = [part.sum(axes, dtype=np.float64) for part in parts]
  mean = np.sum(sums, axis=0) / number
  squares = [((part - mean) ** 2).sum(axes) for part in parts]
  deviation = np.sqrt(np.sum(squares, axis=0) / number)
  # Of equal numbers the deviation may round to what is not 0.
  is_constant = low == x.max(axes)
  is_lost = is_constant | (deviation < np.finfo(np.float32).tiny)
  mean = np.where(is_constant, low, mean) / scale
  return mean, np.where(is_lost, 1, deviation / scale)


class DataSet(NamedTuple):
  """A data set, as its file declares it.

  Attributes:
    name: what commands call it.
    about: for a help text, such as ``"1,797 digits, 8 x 8"``.
    read: from a path, or None, and a side in pixels, or None, to the images;
      those that are still of another side are scaled. Raises
      :class:`DataError`.
    takes_path: whether it is read from a path.
    recognizes: whether a path without a name is one of these.
    is_published: whether its labels get noise by default; your own get none.
    seed_rows: how many training and validation rows each seed of the laboratory
      draws; all others are its test rows. None where the source has test rows:
      a fifth of its training rows are for validation then.
  """

  name: str
  about: str
  read: Callable[[Optional[str], Optional[int]], Images]
  takes_path: bool = False
  recognizes: Callable[[str], bool] = lambda path: False
  is_published: bool = False
  seed_rows: Optional[tuple[int, int]] = None

  @property
  def spelling(self) -> str:
    """How a command names it, such as ``"mnist"`` or ``"cifar10:PATH"``."""
    return f"{self.name}:PATH" if self.takes_path else self.name

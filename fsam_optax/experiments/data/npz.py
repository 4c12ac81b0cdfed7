"""A user's own data: four arrays in an .npz."""

import os
from typing import Any, Optional, cast
import zipfile

import numpy as np

from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import labels
from fsam_optax.experiments.data.images import DataError
from fsam_optax.experiments.data.images import DataSet
from fsam_optax.experiments.data.images import Images
from fsam_optax.experiments.data.images import reason

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load(path: str, image_size: Optional[int] = None) -> Images:
  """Reads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  Args:
    path: what :func:`numpy.savez` wrote. Inputs are real numbers of shape
      ``[n, features]``, ``[n, height, width]`` or ``[n, height, width,
      channels]``. Images of shape ``[n, 1 or 3, height, width]`` are turned so
      that their channels come last, unless the width, too, is 1 or 3. For the
      labels see :func:`fsam_optax.experiments.data.labels.read`. Nothing is
      unpickled.
    image_size: side in pixels to scale images to; None to leave them.

  Returns:
    The images, on the scale that they had: in uint8 where they were so, in
    float64 where they had more than float32 holds, and else in float32.

  Raises:
    DataError: if the file cannot be read or an array is not as above.
  """
  x_train, y_train, x_test, y_test = _arrays(path)
  for name, x in (("x_train", x_train), ("x_test", x_test)):
    if x.dtype.kind not in "iuf":
      raise DataError(
        f"`{name}` must be of an integer or floating dtype, got {x.dtype}. "
        "Convert it, as with astype(np.float32)"
      )
    if x.ndim not in (2, 3, 4) or x.size == 0:
      raise DataError(
        f"`{name}` must have the shape [n, features], [n, height, width] or "
        f"[n, height, width, channels] and not be empty, got {list(x.shape)}"
      )
  if x_train.shape[1:] != x_test.shape[1:]:
    raise DataError(
      "`x_test` must have rows of the shape of those of `x_train`, "
      f"{list(x_train.shape[1:])}, got {list(x_test.shape[1:])}"
    )
  kinds = {x_train.dtype, x_test.dtype}
  if len(kinds) > 1 and any(kind.kind != "f" for kind in kinds):
    raise DataError(
      "`x_test` must have the dtype of `x_train`, for their scales to agree, "
      f"got {x_test.dtype} and {x_train.dtype}"
    )
  y_train, y_test, classes, notes = labels.read(
    y_train, y_test, len(x_train), len(x_test)
  )
  x_train = _converted("x_train", x_train)
  x_test = _converted("x_test", x_test)
  if np.ptp(x_train) == 0:
    raise DataError(
      "`x_train` must not be constant: it is divided by its standard "
      f"deviation. Got {x_train.flat[0]:g} throughout"
    )
  if _is_channels_first(x_train.shape):
    turn = lambda x: np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    x_train, x_test = turn(x_train), turn(x_test)
    notes += (
      f"the images of {printable(path)} have their channels first, and are "
      f"read as {' x '.join(map(str, x_train.shape[1:]))}, channels last",
    )
  return Images(
    printable(path), x_train, y_train, x_test, y_test, classes, notes=notes
  ).resized(image_size)


def _arrays(path: str) -> list[np.ndarray]:
  """The four arrays, whole and each but once there."""
  try:
    if not os.path.isfile(path):  # A pipe would be waited for.
      raise ValueError("there is no such file")
    with open(path, "rb") as file:
      archive = np.load(file, allow_pickle=False)
      if isinstance(archive, np.ndarray):
        raise ValueError("it is one array, an .npy")
      for name in _ARRAYS:
        if (count := archive.files.count(name)) != 1:
          raise ValueError(f"it holds {name} {count} times")
      return [_whole(cast(Any, archive.zip), name) for name in _ARRAYS]
  # zipfile, its decompressors and NumPy have a dozen ways to say that a file is
  # damaged or pickled; none of them is this program's mistake.
  except Exception as error:
    raise DataError(
      f"must be an archive of the arrays {', '.join(_ARRAYS)}, each once, got "
      f"{path!r}, which cannot be read as one ({reason(error)}). Write it with "
      "np.savez(path, x_train=..., y_train=..., ...)"
    ) from error


def _whole(file: zipfile.ZipFile, name: str) -> np.ndarray:
  (member,) = {name, f"{name}.npy"} & {*file.namelist()}
  with file.open(member) as stream:
    array = np.lib.format.read_array(stream, allow_pickle=False)
    if stream.read(1):  # At its end the checksum is compared.
      raise ValueError(f"{name} is longer than its header says")
  return array


def _converted(name: str, x: np.ndarray) -> np.ndarray:
  """The inputs in a dtype that holds them, with an axis of channels."""
  x = x[..., None] if x.ndim == 3 else x
  if x.dtype == np.uint8:
    return x
  with np.errstate(over="ignore"):
    narrow = x.astype(np.float32)
  if bad := int(np.sum(~np.isfinite(narrow))):
    raise DataError(
      f"`{name}` must be finite in float32, got {bad} values that are not. "
      "Remove or replace them"
    )
  is_held = np.array_equal(narrow, x)
  return narrow if is_held else x.astype(np.float64)


def _is_channels_first(shape: tuple[int, ...]) -> bool:
  """Whether images are ``[n, channels, height, width]``."""
  if len(shape) != 4:
    return False
  first, last = shape[1], shape[3]
  if first in (1, 3) and last not in (1, 3):
    return True
  if first in (1, 3) or (first < 5 and last > 4):
    raise DataError(
      "`x_train` must have the shape [n, height, width, channels], got "
      f"{list(shape)}, whose channels may be first or last. Put them last with "
      "x.transpose(0, 2, 3, 1), or hand over [n, height, width] or [n, "
      "features]"
    )
  return False


ENTRY = DataSet(
  name="npz",
  about="an .npz with x_train, y_train, x_test and y_test",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  recognizes=lambda path: path.lower().endswith(".npz"),
)

"""A user's own data: four arrays in an .npz."""

from typing import Any, cast

import numpy as np

from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import images

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load(path: str) -> images.Images:
  """Reads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  Args:
    path: what :func:`numpy.savez` wrote. Inputs are real numbers of shape
      ``[n, features]``, ``[n, height, width]`` or ``[n, height, width,
      channels]``. Labels are integers from 0 to the number of classes minus
      one, shape ``[n]``. Nothing is unpickled.

  Returns:
    The images, on the scale that they had: in uint8 where they were so, and
    else in float32.
  """
  x_train, y_train, x_test, y_test = _arrays(path)
  _check_inputs(x_train, x_test)
  y_train = _labels("y_train", y_train, len(x_train))
  y_test = _labels("y_test", y_test, len(x_test))
  classes = len(present := np.unique(y_train))
  if classes < 2 or present[-1] != classes - 1 or y_test.max() >= classes:
    raise images.DataError(
      "`y_train` must hold every label from 0 to the number of classes minus "
      "one, two classes at least, and `y_test` no other, got "
      f"{classes} distinct labels up to {present[-1]}, and up to "
      f"{y_test.max()}. Renumber both together: np.unique(y, "
      "return_inverse=True)[1]"
    )
  x_train = _converted("x_train", x_train)
  x_test = _converted("x_test", x_test)
  return images.Images(
    printable(path), x_train, y_train, x_test, y_test, classes
  )


def _arrays(path: str) -> list[np.ndarray]:
  try:
    with (
      open(path, "rb") as file,
      cast(Any, np.load(file, allow_pickle=False)) as archive,
    ):
      if damaged := archive.zip.testzip():
        raise ValueError(f"the checksum of {damaged} is wrong")
      return [archive[name] for name in _ARRAYS]
  # zipfile, its decompressors and NumPy have a dozen ways to say that a file is
  # damaged or pickled; none of them is this program's mistake.
  except Exception as error:
    raise images.DataError(
      f"must be an archive of the arrays {', '.join(_ARRAYS)}, got {path!r}, "
      f"which cannot be read as one ({images.reason(error)}). Write it with "
      "np.savez(path, x_train=..., y_train=..., ...)"
    ) from error


def _check_inputs(x_train: np.ndarray, x_test: np.ndarray) -> None:
  kinds = {x_train.dtype, x_test.dtype}
  if any(kind.kind not in "iuf" for kind in kinds) or (
    len(kinds) > 1 and any(kind.kind != "f" for kind in kinds)
  ):
    raise images.DataError(
      "`x_train` and `x_test` must be of one integer or floating dtype, for "
      f"their scales to agree, got {x_train.dtype} and {x_test.dtype}. Convert "
      "them, as with astype(np.float32)"
    )
  shape = x_train.shape[1:]
  if len(shape) not in (1, 2, 3) or x_train.size == 0 or x_test.size == 0:
    raise images.DataError(
      "`x_train` must have the shape [n, features], [n, height, width] or "
      "[n, height, width, channels], and no input be empty, got "
      f"{list(x_train.shape)} and {list(x_test.shape)}"
    )
  if x_test.shape[1:] != shape:
    raise images.DataError(
      "`x_test` must have rows of the shape of those of `x_train`, "
      f"{list(shape)}, got {list(x_test.shape[1:])}"
    )
  if len(shape) == 3 and (
    shape[0] in (1, 3) or (shape[0] < 5 and shape[2] > 4)
  ):
    raise images.DataError(
      "`x_train` must have the shape [n, height, width, channels], got "
      f"{list(x_train.shape)}, whose channels seem to come first. Put them "
      "last with x.transpose(0, 2, 3, 1), or save [n, height, width] or "
      "[n, features]"
    )


def _labels(name: str, y: np.ndarray, rows: int) -> np.ndarray:
  if y.dtype.kind not in "iu" or y.shape != (rows,):
    remedy = "Save as many labels as rows"
    if y.dtype.kind not in "iu" or y.ndim != 1:
      remedy = (
        "Of words take np.unique(y, return_inverse=True)[1], of one-hot rows "
        "y.argmax(axis=1)"
      )
    raise images.DataError(
      f"`{name}` must hold one integer label a row, shape [{rows}], got "
      f"{y.dtype} of shape {list(y.shape)}. {remedy}"
    )
  if y.min() < 0 or y.max() >= 2**31:
    raise images.DataError(
      f"`{name}` must hold labels from 0 to below 2**31, got {y.min()} to "
      f"{y.max()}"
    )
  return y.astype(np.int32)


def _converted(name: str, x: np.ndarray) -> np.ndarray:
  """The inputs in uint8 or float32, with an axis of channels."""
  x = x[..., None] if x.ndim == 3 else x
  if x.dtype == np.uint8:
    return x
  with np.errstate(over="ignore"):
    narrow = x.astype(np.float32)
  if bad := int(np.sum(~np.isfinite(narrow))):
    raise images.DataError(
      f"`{name}` must be finite in float32, got {bad} values that are not. "
      "Remove or replace them"
    )
  if name == "x_train" and not np.array_equal(narrow, x):
    _check_rounding(x)
  return narrow


def _check_rounding(x: np.ndarray) -> None:
  """Raises where float32 would round the differences between rows away."""
  axes = tuple(range(x.ndim - 1))
  low, high = x.min(axes), x.max(axes)
  deviation = x.std(axes, dtype=np.float64)
  largest = np.maximum(np.abs(low), np.abs(high)).astype(np.float64)
  # Half of the distance between two numbers of float32 of that size.
  is_lost = (low < high) & (largest * 2.0**-24 > deviation / 256)
  if is_lost.any():
    worst = int(np.argmax(is_lost))
    raise images.DataError(
      "`x_train` must hold differences that survive float32, got values up to "
      f"{largest[worst]:g} with a standard deviation of {deviation[worst]:g} "
      f"in channel {worst}. Subtract their mean before you save them"
    )


ENTRY = images.DataSet(
  name="npz",
  about="an .npz with x_train, y_train, x_test and y_test",
  read=lambda path, image_size: load(str(path)),
  takes_path=True,
  recognizes=lambda path: path.lower().endswith(".npz"),
)

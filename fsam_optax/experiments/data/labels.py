"""Labels as people have them: numbers, words or one-hot rows."""

import sys

import numpy as np

from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data.images import DataError

_SHOWN = 5


def read(
  y_train: np.ndarray, y_test: np.ndarray, train: int, test: int
) -> tuple[np.ndarray, np.ndarray, int, tuple[str, ...]]:
  """Numbers the classes.

  Examples:
    >>> import numpy as np
    >>> y_train, y_test = np.array(["dog", "cat"]), np.array(["dog"])
    >>> print(*read(y_train, y_test, 2, 1))
    [1 0] [1] 2 ("the labels are words, numbered in sorted order: 0 'cat', 1 \
'dog'",)

  Args:
    y_train: integers from 0 to the number of classes minus one, shape ``[n]``;
      or words, shape ``[n]``, whose sorted order is their number; or one-hot
      rows, shape ``[n, classes]``.
    y_test: the same of the test rows.
    train: number of training rows.
    test: number of test rows.

  Returns:
    Both in int32, the number of classes, and notes on what was made of them.

  Raises:
    DataError: if the labels are none of these, or a class has no training row.
  """
  notes: tuple[str, ...] = ()
  columns = y_train.shape[1] if y_train.ndim == 2 else None
  if y_train.dtype.kind in "SU" or y_test.dtype.kind in "SU":
    _check_shape("y_train", y_train, train)
    _check_shape("y_test", y_test, test)
    y_train, y_test, notes = _from_words(y_train, y_test)
  else:
    if y_train.ndim == y_test.ndim == 2 and y_train.shape[1] != y_test.shape[1]:
      raise DataError(
        f"`y_test` must have the {y_train.shape[1]} columns of `y_train`, got "
        f"{y_test.shape[1]}"
      )
    y_train = _numbers("y_train", y_train, train)
    y_test = _numbers("y_test", y_test, test)
  classes = _classes(y_train, y_test)
  if columns not in (None, classes):
    raise DataError(
      f"`y_train` must have a row of each of its {columns} columns, got "
      f"{classes} classes. Drop the empty columns, in `y_test`, too"
    )
  return y_train, y_test, classes, notes


def _check_shape(name: str, y: np.ndarray, rows: int) -> None:
  if y.shape != (rows,):
    remedy = ". Drop the axis of 1: y[:, 0]" if y.shape == (rows, 1) else ""
    raise DataError(
      f"`{name}` must have one label a row, shape [{rows}], or be one-hot, "
      f"[{rows}, classes], got {list(y.shape)}{remedy}"
    )


def _from_words(
  y_train: np.ndarray, y_test: np.ndarray
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
  train = _words("y_train", y_train)
  test = _words("y_test", y_test)
  names = sorted(set(train))
  if unknown := sorted(set(test) - set(names)):
    raise DataError(
      "`y_test` must hold labels that occur in `y_train`, got "
      f"{', '.join(map(repr, unknown[:_SHOWN]))}"
    )
  numbers = {name: i for i, name in enumerate(names)}
  shown = [f"{i} {name!r}" for i, name in enumerate(names[:_SHOWN])]
  if len(names) > _SHOWN:
    shown[-1] = f"and so on to {len(names) - 1} {names[-1]!r}"
  note = printable(
    f"the labels are words, numbered in sorted order: {', '.join(shown)}"
  )
  number = lambda words: np.array([numbers[word] for word in words], np.int32)
  return number(train), number(test), (note,)


def _words(name: str, y: np.ndarray) -> list[str]:
  if y.dtype.kind not in "SU":
    raise DataError(
      f"`{name}` must hold words where the other labels do, got {y.dtype}"
    )
  try:
    if y.dtype.kind == "U" and y.dtype.itemsize:
      # NumPy makes a word of any number, of which Python makes an odd one.
      native = np.ascontiguousarray(y.astype(y.dtype.newbyteorder("=")))
      if native.view(np.uint32).max(initial=0) > sys.maxunicode:
        raise ValueError("a number that is no character")
      return native.tolist()
    return [x.decode() if isinstance(x, bytes) else x for x in y.tolist()]
  except ValueError as error:
    raise DataError(
      f"`{name}` must hold words in UTF-8, got one that is not ({error})"
    ) from error


def _numbers(name: str, y: np.ndarray, rows: int) -> np.ndarray:
  if y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf":
    return _from_one_hot(name, y, rows)
  if y.dtype.kind not in "iu":
    raise DataError(
      f"`{name}` must hold integer labels, words or one-hot rows, got "
      f"{y.dtype}. Convert whole numbers with astype(np.int32)"
    )
  _check_shape(name, y, rows)
  if y.min() < 0:
    raise DataError(f"`{name}` must hold non-negative labels, got {y.min()}")
  if y.max() >= 2**31:
    raise DataError(f"`{name}` must hold labels below 2**31, got {y.max()}")
  return y.astype(np.int32)


def _from_one_hot(name: str, y: np.ndarray, rows: int) -> np.ndarray:
  if len(y) != rows:
    raise DataError(
      f"`{name}` must have one label a row, [{rows}, {y.shape[1]}], got "
      f"{list(y.shape)}"
    )
  is_one = y == 1
  is_whole = np.all(is_one | (y == 0), axis=1) & (is_one.sum(axis=1) == 1)
  if not is_whole.all():
    row = int(np.argmin(is_whole))
    raise DataError(
      f"`{name}` must be one-hot where it has columns, exactly one 1 and else "
      f"0 in a row, got {y[row, :_SHOWN].tolist()} at the start of row {row}. "
      "Where the largest number says the class, save y.argmax(axis=1)"
    )
  return is_one.argmax(axis=1).astype(np.int32)


def _classes(y_train: np.ndarray, y_test: np.ndarray) -> int:
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

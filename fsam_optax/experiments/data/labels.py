"""Labels as people have them: numbers, words or one-hot rows."""

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

  They are integers from 0 to the number of classes minus one, shape ``[n]``; or
  words, shape ``[n]``, whose sorted order is their number; or one-hot rows,
  shape ``[n, classes]``; of ``train`` and of ``test`` rows.

  Returns:
    Both in int32, the number of classes, and notes on what was made of them.

  Raises:
    DataError: if the labels are none of these, or a class has no training row.
  """
  notes: tuple[str, ...] = ()
  columns = y_train.shape[1] if y_train.ndim == 2 else None
  if y_train.dtype.kind in "SU" or y_test.dtype.kind in "SU":
    names = sorted({*_words("y_train", y_train, train)})
    numbers = {name: i for i, name in enumerate(names)}
    found = [_words("y_train", y_train, train), _words("y_test", y_test, test)]
    if unknown := sorted({*found[1]} - {*names}):
      raise DataError(
        "`y_test` must hold labels that occur in `y_train`, got "
        f"{', '.join(map(repr, unknown[:_SHOWN]))}"
      )
    y_train, y_test = (np.array([numbers[x] for x in y], int) for y in found)
    shown = [f"{i} {name!r}" for i, name in enumerate(names)]
    if len(names) > _SHOWN:
      shown[_SHOWN - 1 :] = [f"and so on to {shown[-1]}"]
    note = f"the labels are words, numbered in sorted order: {', '.join(shown)}"
    notes = (printable(note),)
  else:
    if y_train.ndim == y_test.ndim == 2 and y_train.shape[1] != y_test.shape[1]:
      raise DataError(
        f"`y_test` must have the {y_train.shape[1]} columns of `y_train`, got "
        f"{y_test.shape[1]}"
      )
    y_train = _numbers("y_train", y_train, train)
    y_test = _numbers("y_test", y_test, test)
  classes = len(present := np.unique(y_train))
  if (
    classes < 2 or present[-1] != classes - 1 or columns not in (None, classes)
  ):
    raise DataError(
      "`y_train` must hold every label from 0 to the number of classes minus "
      f"one, and two classes at least, got {classes} distinct labels up to "
      f"{columns - 1 if columns else present[-1]}. Renumber them with "
      "np.unique(y, return_inverse=True)"
    )
  if y_test.max() >= classes:
    raise DataError(
      f"`y_test` must hold labels that occur in `y_train`, 0 to {classes - 1}, "
      f"got {y_test.max()}"
    )
  return y_train.astype(np.int32), y_test.astype(np.int32), classes, notes


def _check_shape(name: str, y: np.ndarray, rows: int) -> None:
  if y.shape != (rows,):
    raise DataError(
      f"`{name}` must have one label a row, shape [{rows}], or be one-hot, "
      f"[{rows}, classes], got {list(y.shape)}"
    )


def _words(name: str, y: np.ndarray, rows: int) -> list[str]:
  _check_shape(name, y, rows)
  if y.dtype.kind not in "SU":
    raise DataError(
      f"`{name}` must hold words where the other labels do, got {y.dtype}"
    )
  try:
    words = [x.decode() if isinstance(x, bytes) else x for x in y.tolist()]
    "".join(words).encode()  # NumPy makes a word of any number.
    return words
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
  if y.min() < 0 or y.max() >= 2**31:
    raise DataError(
      f"`{name}` must hold labels from 0 to below 2**31, got {y.min()} to "
      f"{y.max()}"
    )
  return y


def _from_one_hot(name: str, y: np.ndarray, rows: int) -> np.ndarray:
  is_one = y == 1
  is_whole = np.all(is_one | (y == 0), axis=1) & (is_one.sum(axis=1) == 1)
  if not is_whole.all():
    row = int(np.argmin(is_whole))
    raise DataError(
      f"`{name}` must be one-hot where it has columns, exactly one 1 and else "
      f"0 in a row, got {y[row, :_SHOWN].tolist()} at the start of row {row}. "
      "Where the largest number says the class, save y.argmax(axis=1)"
    )
  _check_shape(name, numbers := is_one.argmax(axis=1), rows)
  return numbers

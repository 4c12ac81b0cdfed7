"""Labels as numbers, words and one-hot rows."""

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import npz

WORDS = ["owl", "cat", "dog", "cat"]


def save(path, y_train, y_test):
  rng = np.random.default_rng(0)
  draw = lambda y: rng.normal(size=(len(y), 5))
  np.savez(
    path, x_train=draw(y_train), y_train=y_train, x_test=draw(y_test),
    y_test=y_test,
  )  # fmt: skip
  return str(path)


@pytest.mark.parametrize("dtype", ["U", "S", ">U7"])
def test_words_are_numbered_in_sorted_order(tmp_path, dtype):
  path = save(
    tmp_path / "a.npz", np.array(WORDS, dtype), np.array(["dog", "owl"], dtype)
  )
  images = npz.load(path)
  np.testing.assert_array_equal(images.y_train, [2, 0, 1, 0])
  np.testing.assert_array_equal(images.y_test, [1, 2])
  assert images.y_train.dtype == np.int32
  assert images.classes == 3
  assert images.notes == (
    "the labels are words, numbered in sorted order: 0 'cat', 1 'dog', 2 'owl'",
  )


def test_many_words_are_named_by_the_first_and_the_last(tmp_path):
  words = np.array([f"w{i:02}" for i in range(20)])
  (note,) = npz.load(save(tmp_path / "a.npz", words, words)).notes
  assert note.endswith("3 'w03', and so on to 19 'w19'")


def test_words_with_escape_sequences_are_written_out(tmp_path):
  words = np.array(["a\x1b[2J", "b"])
  (note,) = npz.load(save(tmp_path / "a.npz", words, words)).notes
  assert note.isprintable()
  assert r"'a\x1b[2J'" in note


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_one_hot_rows_are_the_place_of_their_one(tmp_path, dtype):
  path = tmp_path / "a.npz"
  images = npz.load(
    save(path, np.eye(3, dtype=dtype)[[2, 0, 1, 0]], np.eye(3)[[1, 2]])
  )
  np.testing.assert_array_equal(images.y_train, [2, 0, 1, 0])
  np.testing.assert_array_equal(images.y_test, [1, 2])
  assert images.classes == 3


SOFT = np.array([[0.2, 0.8], [1, 0]])


@pytest.mark.parametrize(
  ("y_train", "y_test", "message"),
  [
    (SOFT, np.eye(2), r"exactly one 1.*got \[0\.2, 0\.8\] at the start of row"),
    (np.eye(2), np.ones((2, 2)), r"`y_test` .*exactly one 1.*row 0.*argmax"),
    (np.eye(2), np.zeros((2, 2)), "exactly one 1"),
    (np.eye(2), np.full((2, 2), np.nan), "exactly one 1"),
    (np.eye(2), np.eye(3)[:2], "must have the 2 columns of `y_train`, got 3"),
    (np.eye(3)[:2], np.eye(3)[:2], "each of its 3 columns, got 2"),
    (np.array(["a", "b"]), np.array([0, 1]), "hold words where the other"),
    (np.array(["a", "b"]), np.array(["c", "a"]), "occur in .*, got 'c'"),
    (np.array(["a", "a"]), np.array(["a"]), "two classes at least"),
    (np.array([["a"], ["b"]]), np.array(["a"]), r"got \[2, 1\]. Drop the axis"),
    (np.array([b"\xff", b"a"]), np.array([b"a"]), "words in UTF-8"),
    (np.array([0.0, 1.0]), np.array([0]), r"whole numbers with astype"),
    (np.array([0, 1]) * 1j, np.array([0]), "integer labels, words or one-hot"),
  ],
)  # fmt: skip
def test_labels_of_another_kind_are_refused(tmp_path, y_train, y_test, message):
  with pytest.raises(data.DataError, match=message) as error:
    npz.load(save(tmp_path / "a.npz", y_train, y_test))
  assert "\n" not in str(error.value)


def test_letters_that_are_none_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  words = np.array([0x110000, 0x61], np.uint32).view("<U1")
  with pytest.raises(data.DataError, match="words in UTF-8"):
    npz.load(save(path, words, words))

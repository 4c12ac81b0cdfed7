"""The reader of image folders."""

import os

import numpy as np
from PIL import Image
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import folder as folder_lib


def write(path, seed=0, size=(12, 10), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  shape = (*size, 3) if mode == "RGB" else size
  pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  Image.fromarray(pixels).save(path)
  return pixels


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
  """Three classes, of which the test rows have two."""
  for i, name in enumerate(("cat", "dog", "owl")):
    for j in range(3):
      write(tmp_path / "train" / name / f"{j}.png", seed=10 * i + j)
  write(tmp_path / "test" / "cat" / "a.png", seed=100)
  write(tmp_path / "test" / "owl" / "b.png", seed=101)
  (tmp_path / "train" / ".hidden").mkdir()
  (tmp_path / "train" / "cat" / ".DS_Store").write_bytes(b"no image")
  return tmp_path


def expect(message, folder, size=None):
  with pytest.raises(data.DataError, match=message):
    folder_lib.load(str(folder), size)


def test_folder_holds_its_pixels_in_the_order_of_names(folder):
  images = data.load(str(folder))
  assert images.classes == 3
  again = data.load(f"folder:{folder}")
  assert again.fingerprint() == images.fingerprint()
  assert images.x_train.shape == (9, 12, 10, 3)
  assert images.x_train.dtype == np.uint8
  np.testing.assert_array_equal(images.y_train, np.repeat([0, 1, 2], 3))
  np.testing.assert_array_equal(images.y_test, [0, 2])
  expected = np.random.default_rng(11).integers(0, 256, (12, 10, 3), np.uint8)
  np.testing.assert_array_equal(images.x_train[4], expected)


def test_reading_that_takes_long_says_how_far_it_is(
  folder, capsys, monkeypatch
):
  folder_lib.load(str(folder))
  assert not capsys.readouterr().err
  monkeypatch.setattr(progress, "_SECONDS", 0.0)
  folder_lib.load(str(folder))
  said = capsys.readouterr().err.splitlines()
  assert said == [
    f"reading the images in {folder}: {done} of 11" for done in range(1, 12)
  ]


def test_folder_is_scaled_to_a_size(folder):
  write(folder / "train" / "dog" / "wide.jpg", size=(40, 90))
  write(folder / "train" / "dog" / "gray.png", size=(30, 30), mode="L")
  images = folder_lib.load(str(folder), 8)
  assert images.x_train.shape == (11, 8, 8, 3)
  # Of the dogs 0, 1, 2, gray and wide, after three cats.
  is_gray = (images.x_train[3:8] == images.x_train[3:8, ..., :1]).all((1, 2, 3))
  np.testing.assert_array_equal(is_gray, [False, False, False, True, False])


def test_files_that_do_not_belong_are_named(folder):
  write(folder / "train" / "dog" / "wide.png", size=(40, 90))
  expect(r"dog/wide\.png' of 40 x 90 pixels.*--image-size 10", folder)


def test_damaged_images_are_named(folder):
  path = folder / "train" / "dog" / "1.png"
  path.write_bytes(path.read_bytes()[:200])
  expect(r"dog/1\.png', which cannot be read", folder)
  path.write_bytes(b"text")
  expect(r"dog/1\.png', which cannot be read", folder)
  expect(r"dog/1\.png', which cannot be read", folder, 8)


def test_folders_without_what_they_must_hold_are_named(folder, tmp_path):
  (folder / "test" / "cow").mkdir()
  expect("got 'cow', which train does not have", folder)
  (folder / "test" / "cow").rmdir()
  (folder / "test" / "dog").mkdir()
  expect("images of every class, got none in .*test/dog", folder)
  (folder / "test" / "dog").rmdir()
  (folder / "test").rename(folder / "val")
  assert len(folder_lib.load(str(folder)).y_test) == 2
  (folder / "val").rename(folder / "else")
  expect("a folder test beside train", folder)
  (tmp_path / "other" / "train" / "one").mkdir(parents=True)
  (tmp_path / "other" / "test").mkdir()
  expect("a subfolder for each class in train, two at least, got 1",
         tmp_path / "other")  # fmt: skip
  assert folder_lib.is_image_folder(str(folder))
  assert not folder_lib.is_image_folder(str(folder / "train" / "cat"))


def test_folders_inside_of_a_class_are_named(folder):
  write(folder / "train" / "cat" / "more" / "4.png")
  (folder / "train" / "cat" / "none").mkdir()
  expect(r"got 2 folders .*train/cat': 'more', 'none'\. Move", folder)


@pytest.mark.parametrize("at", ["train/cat/x.png", "train/cow", "test/x", "x"])
def test_links_to_nothing_are_named(folder, at):
  (folder / at).symlink_to(folder / "nothing")
  expect(rf"got 1 to nothing in .*'{os.path.basename(at)}'\. Restore", folder)
  (folder / at).unlink()
  (folder / at).symlink_to(folder / at)  # To itself.
  expect("got 1 to nothing", folder)


def test_images_beside_the_classes_are_named_and_lists_are_not(folder):
  (folder / "train" / "labels.csv").write_text("text")
  assert len(folder_lib.load(str(folder)).y_train) == 9
  write(folder / "train" / "stray.png")
  expect(r"got 1 beside 3 subfolders .*'stray\.png'", folder)


def test_pipes_and_devices_are_not_opened(folder):
  os.mkfifo(folder / "train" / "cat" / "a.png")
  expect("images alone in the folder of a class.*'a.png'", folder)
  (folder / "train" / "cat" / "a.png").unlink()
  (folder / "train" / "cat" / "a.png").symlink_to("/dev/zero")
  expect("images alone in the folder of a class.*'a.png'", folder)


def test_a_test_folder_without_classes_points_to_the_one_that_has_them(folder):
  (folder / "test").rename(folder / "val")
  write(folder / "test" / "1.png")
  expect("1 files without a class. To test on 'val', .*take 'test' away",
         folder)  # fmt: skip
  (folder / "val").rename(folder / "else")
  expect("1 files without a class. Sort its images", folder)


def test_names_of_classes_are_written_out(folder):
  (folder / "test" / "c\x1b]0;x\x07w").mkdir()
  expect(r"got 'c\\x1b\]0;x\\x07w', which", folder)


def test_images_of_sixteen_bits_are_counted(folder):
  path = folder / "train" / "dog" / "1.png"
  values = np.arange(120, dtype=np.uint16).reshape(12, 10) * 546
  Image.fromarray(values).save(path)
  images = folder_lib.load(str(folder))
  np.testing.assert_array_equal(images.x_train[4, ..., 1], values // 256)
  assert images.notes == (
    "1 of 11 images have 16 bits a channel, of which the upper 8 are taken",
  )


def test_a_folder_that_does_not_fit_into_memory_is_not_read(
  folder, monkeypatch
):
  monkeypatch.setattr(bounds, "available_memory", lambda: 11 * 360 - 1)
  expect(r"must fit into memory.*11 images of \[12, 10, 3\]", folder)
  expect(r"must fit into memory.*11 images of \[99, 99, 3\]", folder, 99)
  monkeypatch.setattr(bounds, "available_memory", lambda: 11 * 360)
  assert folder_lib.load(str(folder)).classes == 3

"""Paths that are of no data set: what is said of them."""

import os

import numpy as np
from PIL import Image
import pytest

from fsam_optax.experiments import data


def write(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)


def expect(message, path):
  with pytest.raises(data.DataError, match=message) as error:
    data.load(str(path), otherwise="cifar100")
  assert str(error.value).isprintable()
  with pytest.raises(data.DataError):
    data.load(str(path))


def test_a_wrong_path_is_said_not_to_exist(tmp_path):
  expect(r"that exists.*got .*nothing', which is neither.*cifar-100-binary",
         tmp_path / "nothing")  # fmt: skip
  expect("which is neither", tmp_path / ("x" * 300))


def test_another_spelling_of_train_is_named(tmp_path):
  write(tmp_path / "Train" / "cat" / "1.png")
  expect(r"of its training images train, got .*Train'. Rename it", tmp_path)


def test_classes_without_a_split_are_named(tmp_path):
  for name in ("cat", "dog", "owl"):
    write(tmp_path / name / "1.JPG")
  expect("got 3 folders of images without a split in .*'cat', 'dog', 'owl'. "
         "Move them into a folder train", tmp_path)  # fmt: skip


def test_images_without_a_class_are_named(tmp_path):
  write(tmp_path / "1.png")
  expect(r"got 1 images without a class in .*'1\.png'", tmp_path)


def test_other_folders_and_files_are_said_to_be_what_they_are(tmp_path):
  expect("must hold a data set, got nothing in", tmp_path)
  (tmp_path / "notes.txt").write_text("text")
  expect(r"must hold a data set, got 'notes\.txt' in", tmp_path)
  expect(r"got the file .*notes\.txt'. Hand over", tmp_path / "notes.txt")
  os.mkfifo(tmp_path / "pipe")
  expect("which is a pipe", tmp_path / "pipe")
  (tmp_path / "dead").symlink_to("none")
  expect("which is a link to nothing", tmp_path / "dead")


def test_a_broken_version_of_cifar_is_left_to_its_reader(tmp_path):
  (tmp_path / "train.bin").write_bytes(b"")
  expect(r"got no test\.bin", tmp_path)


def test_a_pickled_version_of_cifar_is_left_to_its_reader(tmp_path):
  for name in ("train", "test", "meta"):
    (tmp_path / name).write_bytes(b"")
  with pytest.raises(data.DataError, match="which is pickled"):
    data.load(str(tmp_path), otherwise="cifar100")


def test_an_archive_is_left_to_its_reader(tmp_path):
  path = tmp_path / "x.tar.gz"
  path.write_bytes(b"text")
  expect("with the MD5", path)


def test_without_a_recipe_the_name_goes_in_front(tmp_path):
  path = tmp_path / "x.tar.gz"
  path.write_bytes(b"text")
  with pytest.raises(data.DataError, match="Hand over cifar10:PATH, cifar"):
    data.load(str(path))


def test_a_folder_by_its_name_must_exist(tmp_path):
  with pytest.raises(data.DataError, match="must be a folder that can be"):
    data.load(f"folder:{tmp_path / 'nothing'}")

"""The reader of CIFAR's binary version, on files with few records."""

import io
import tarfile

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import cifar


@pytest.fixture(name="files", params=["cifar10", "cifar100"])
def fixture_files(request, tmp_path, monkeypatch):
  """The name, a folder, its archive and the tables of its files."""
  name = request.param
  published = cifar.FORMATS[name]
  few = lambda files: {file: n // 500 for file, n in files.items()}
  expected = published._replace(
    train=few(published.train), test=few(published.test)
  )
  monkeypatch.setitem(cifar.FORMATS, name, expected)
  folder = tmp_path / expected.folder
  folder.mkdir()
  rng, tables = np.random.default_rng(0), {}
  for file, rows in {**expected.train, **expected.test}.items():
    table = rng.integers(0, 256, (rows, expected.record), np.uint8)
    labels = np.arange(rows) % expected.classes
    table[:, 0] = labels % 20  # The coarse one, where there are two.
    table[:, expected.label_bytes - 1] = labels
    (folder / file).write_bytes(table.tobytes())
    tables[file] = table
  archive = tmp_path / expected.archive
  with tarfile.open(archive, "w:gz") as file:
    file.add(folder, arcname=folder.name)
  return name, folder, archive, tables


def refuse(message, name, path):
  with pytest.raises(data.DataError, match=f"{message}.*from www.cs.toronto"):
    cifar.load(name, str(path))


def test_sizes_are_the_published_ones():
  for name, classes, labels in (("cifar10", 10, 1), ("cifar100", 100, 2)):
    images = cifar.unread(name)
    assert images.x_train.shape == (50_000, 32, 32, 3)
    assert (len(images.y_test), images.classes) == (10_000, classes)
    assert cifar.FORMATS[name].record == labels + 3 * 32 * 32


def test_folder_and_archive_hold_the_same_images(files):
  name, folder, archive, tables = files
  expected = cifar.FORMATS[name]
  images = cifar.load(name, str(folder))
  assert images.classes == expected.classes
  assert (images.x_train.dtype, images.y_train.dtype) == (np.uint8, np.int32)
  record = tables[list(expected.train)[-1]][-1]
  assert images.y_train[-1] == record[expected.label_bytes - 1]
  # Red, green and blue of the pixel in row 2 and column 5.
  pixels = record[expected.label_bytes :].reshape(3, 32, 32)
  np.testing.assert_array_equal(images.x_train[-1, 2, 5], pixels[:, 2, 5])
  (test,) = expected.test
  labels = tables[test][:, expected.label_bytes - 1]
  np.testing.assert_array_equal(images.y_test, labels)
  for other in (
    cifar.load(name, str(folder.parent)),
    cifar.load(name, str(archive)),
    data.load(f"{name}:{folder}"),
    data.load(str(folder), otherwise=name),
  ):
    assert other.name == name
    assert other.fingerprint() == images.fingerprint()


def test_asymmetric_noise_stays_within_a_superclass(files):
  name, folder, _, _ = files
  targets = cifar.load(name, str(folder)).noise_targets
  if name == "cifar10":  # Truck, bird, deer, cat and dog.
    np.testing.assert_array_equal(targets, [0, 1, 0, 5, 7, 3, 6, 7, 8, 1])
    return
  # Here the five classes of a superclass are 20 apart.
  np.testing.assert_array_equal(targets, (np.arange(100) + 20) % 100)


def test_damaged_and_other_archives_are_refused(files, tmp_path):
  name, _, archive, _ = files
  cut = tmp_path / "cut.tar.gz"
  for content in (archive.read_bytes()[:20_000], b"no archive"):
    cut.write_bytes(content)
    refuse("files that can be read, got .*cut", name, cut)
  with tarfile.open(cut, "w:gz") as file:
    file.addfile(tarfile.TarInfo("a/readme.html"), io.BytesIO(b""))
  refuse(r"must hold .*\.bin of .*, got 0 bytes: it is missing", name, cut)
  refuse("No such file", name, tmp_path / "none.tar.gz")


def test_a_file_of_another_size_or_other_labels_is_named(files):
  name, folder, _, tables = files
  expected = cifar.FORMATS[name]
  (file,) = expected.test
  table = tables[file].copy()
  size = table.size
  for content in (table.tobytes()[:-1], table.tobytes() + b"0"):
    (folder / file).write_bytes(content)
    message = f"{file} .* {size:,}, .* got {len(content):,} bytes"
    refuse(message, name, folder)
  table[17, expected.label_bytes - 1] = 255
  (folder / file).write_bytes(table.tobytes())
  refuse(f"in {file}, got 255 at record 17", name, folder)


def test_the_other_and_the_pickled_version_are_refused(files):
  name, folder, _, _ = files
  other = "cifar100" if name == "cifar10" else "cifar10"
  message = f"must hold {other}, got {name} in .*say {name}:/"
  with pytest.raises(data.DataError, match=message):
    cifar.load(other, str(folder))
  for path in folder.iterdir():
    path.rename(path.with_suffix(""))
  refuse("not the pickles of the Python version", name, folder)

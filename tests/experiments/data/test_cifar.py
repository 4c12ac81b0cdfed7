"""The reader of CIFAR's binary version, on files of the real size."""

import gzip
import io
import os
import tarfile
import tracemalloc

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import cifar


def record_bytes(name):
  return cifar.FORMATS[name].label_bytes + 3072


def write_files(name, folder, seed=0):
  """Random records in all files; returns their tables by file name."""
  rng = np.random.default_rng(seed)
  expected = cifar.FORMATS[name]
  folder.mkdir(parents=True, exist_ok=True)
  tables = {}
  for file, records in {**expected.train, **expected.test}.items():
    table = rng.integers(0, 256, (records, record_bytes(name)), np.uint8)
    labels = rng.integers(0, expected.classes, records)
    table[:, 0] = labels % 20  # The coarse one, where there are two.
    table[:, expected.label_bytes - 1] = labels
    (folder / file).write_bytes(table.tobytes())
    tables[file] = table
  return tables


def pack(folder, path):
  with tarfile.open(path, "w:gz", compresslevel=0) as archive:
    archive.add(folder, arcname=folder.name)


@pytest.fixture(name="files", params=["cifar10", "cifar100"], scope="module")
def fixture_files(request, tmp_path_factory):
  name = request.param
  root = tmp_path_factory.mktemp(name)
  folder = root / cifar.FORMATS[name].folder
  tables = write_files(name, folder)
  archive = root / cifar.FORMATS[name].archive
  pack(folder, archive)
  return name, folder, archive, tables


def check(images, name, tables):
  expected = cifar.FORMATS[name]
  assert images.classes == expected.classes
  assert images.x_train.shape == (50_000, 32, 32, 3)
  assert images.x_test.shape == (10_000, 32, 32, 3)
  assert images.x_train.dtype == np.uint8
  assert images.y_train.dtype == np.int32
  rows, tests, image, classes = data.REGISTRY[name].sizes
  assert (rows, *image) == images.x_train.shape
  assert (tests, *image) == images.x_test.shape
  assert classes == images.classes
  last = list(expected.train)[-1]
  record = tables[last][-1]
  assert images.y_train[-1] == record[expected.label_bytes - 1]
  pixels = record[expected.label_bytes :]
  # Red, green and blue of the pixel in row 2 and column 5.
  place = 2 * 32 + 5
  np.testing.assert_array_equal(
    images.x_train[-1, 2, 5], pixels[[place, 1024 + place, 2048 + place]]
  )
  np.testing.assert_array_equal(
    images.y_test,
    tables[next(iter(expected.test))][:, expected.label_bytes - 1],
  )


@pytest.mark.slow
def test_folder_and_archive_hold_the_same_images(files):
  name, folder, archive, tables = files
  images = cifar.load(name, str(folder))
  check(images, name, tables)
  above = cifar.load(name, str(folder.parent))
  packed = cifar.load(name, str(archive), check_sum=False)
  named = data.load(f"{name}:{folder}")
  assert named.fingerprint() == images.fingerprint()
  assert data.load(str(folder), otherwise=name).name == name
  for one, two, three in zip(images, above, packed, strict=True):
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


def test_asymmetric_noise_stays_within_a_superclass(files):
  name, folder, _, _ = files
  targets = cifar.load(name, str(folder)).noise_targets
  if name == "cifar10":  # Truck, bird, deer, cat and dog.
    np.testing.assert_array_equal(targets, [0, 1, 0, 5, 7, 3, 6, 7, 8, 1])
    return
  # Here the five classes of a superclass are 20 apart.
  np.testing.assert_array_equal(targets, (np.arange(100) + 20) % 100)


def test_archive_must_have_the_published_checksum(files):
  name, _, archive, _ = files
  with pytest.raises(data.DataError, match=cifar.FORMATS[name].md5):
    cifar.load(name, str(archive))


def test_truncated_archive_is_named(files, tmp_path):
  name, _, archive, _ = files
  cut = tmp_path / archive.name
  content = archive.read_bytes()
  cut.write_bytes(content[: len(content) // 2])
  with pytest.raises(data.DataError, match="truncated or damaged") as error:
    cifar.load(name, str(cut), check_sum=False)
  assert str(cut) in str(error.value)
  cut.write_bytes(b"no archive")
  with pytest.raises(data.DataError, match="truncated or damaged"):
    cifar.load(name, str(cut), check_sum=False)


def linked(folder, target):
  """A copy of the folder by links, in which one file may be replaced."""
  target.mkdir()
  for path in folder.iterdir():
    (target / path.name).symlink_to(path)
  return target


def replace(folder, name, content):
  (folder / name).unlink()
  (folder / name).write_bytes(content)


def test_file_cut_short_is_named_with_its_size(files, tmp_path):
  name, folder, _, tables = files
  copy = linked(folder, tmp_path / "copy")
  file = next(iter(cifar.FORMATS[name].test))
  replace(copy, file, tables[file].tobytes()[:-1])
  size = 10_000 * record_bytes(name)
  with pytest.raises(data.DataError, match=f"{file} .*{size:,}.*{size - 1:,}"):
    cifar.load(name, str(copy))


def test_label_out_of_range_is_named_with_its_record(files, tmp_path):
  name, folder, _, tables = files
  copy = linked(folder, tmp_path / "copy")
  file = next(iter(cifar.FORMATS[name].test))
  table = tables[file].copy()
  table[17, cifar.FORMATS[name].label_bytes - 1] = 255
  replace(copy, file, table.tobytes())
  with pytest.raises(data.DataError, match=f"{file}, got 255 at record 17"):
    cifar.load(name, str(copy))


def test_missing_file_is_named(files, tmp_path):
  name, folder, _, _ = files
  copy = linked(folder, tmp_path / "copy")
  file = next(iter(cifar.FORMATS[name].train))
  (copy / file).unlink()
  with pytest.raises(data.DataError, match=f"got no {file} in"):
    cifar.load(name, str(copy))


def test_archive_without_a_file_names_it(tmp_path):
  path = tmp_path / "cifar.tar.gz"
  with tarfile.open(path, "w:gz") as archive:
    member = tarfile.TarInfo("cifar-10-batches-bin/readme.html")
    archive.addfile(member, io.BytesIO(b""))
  with pytest.raises(data.DataError, match=r"got no data_batch_1\.bin"):
    cifar.load("cifar10", str(path), check_sum=False)


def pickled(root):
  folder = root / "cifar-10-batches-py"
  folder.mkdir()
  (folder / "data_batch_1").write_bytes(b"\x80\x02")
  archive = root / "cifar-10-python.tar.gz"
  pack(folder, archive)
  return root, folder, archive


@pytest.mark.parametrize("at", range(3))
def test_pickled_version_is_refused_with_the_reason(tmp_path, at):
  with pytest.raises(data.DataError, match="pickled: to unpickle a file is to"):
    cifar.load("cifar10", str(pickled(tmp_path)[at]))


def test_a_name_does_not_make_a_version(files, tmp_path):
  name, folder, _, tables = files
  copy = linked(folder, tmp_path / "my-python-data-py")
  check(cifar.load(name, str(copy)), name, tables)


def test_the_other_version_is_named(files):
  name, folder, _, _ = files
  other = "cifar100" if name == "cifar10" else "cifar10"
  with pytest.raises(data.DataError, match=f"which has those of {name}"):
    cifar.load(other, str(folder))


@pytest.mark.parametrize("size", [0, 40 * 2**30])
def test_a_file_of_another_size_is_not_read(files, tmp_path, size):
  name, folder, _, _ = files
  copy = linked(folder, tmp_path / "copy")
  file = next(iter(cifar.FORMATS[name].test))
  replace(copy, file, b"")
  os.truncate(copy / file, size)
  with pytest.raises(data.DataError, match=f"{file} .*got {size:,} bytes"):
    cifar.load(name, str(copy))


def test_what_is_no_regular_file_is_not_read(files, tmp_path):
  name, folder, _, _ = files
  copy = linked(folder, tmp_path / "copy")
  file = next(iter(cifar.FORMATS[name].train))
  for make, message in (
    (lambda path: path.symlink_to("/dev/zero"), "which is a device"),
    (os.mkfifo, "which is a pipe"),
    (lambda path: path.mkdir(), "which is a folder"),
    (lambda path: path.symlink_to("none"), "which is a link to nothing"),
  ):
    (copy / file).unlink()
    make(copy / file)
    with pytest.raises(data.DataError, match=message):
      cifar.load(name, str(copy))
    if (copy / file).is_dir() and not (copy / file).is_symlink():
      (copy / file).rmdir()
      (copy / file).touch()


@pytest.mark.parametrize("check_sum", [False, True])
def test_an_archive_that_never_ends_is_not_read(tmp_path, check_sum):
  path = tmp_path / "cifar-10-binary.tar.gz"
  with path.open("wb") as file:
    file.truncate(40 * 2**30)
  with pytest.raises(data.DataError, match=r"got .* of 42,949,672,960"):
    cifar.load("cifar10", str(path), check_sum=check_sum)
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(data.DataError, match="which is a pipe"):
    cifar.load("cifar10", str(path), check_sum=check_sum)


def tar_of(path, *members):
  """Members by name, size and, where it is another one, the size claimed."""
  with gzip.open(path, "wb", compresslevel=1) as file:
    for name, size, claimed in members:
      member = tarfile.TarInfo(name)
      member.size = claimed
      file.write(member.tobuf(tarfile.GNU_FORMAT))
      for _ in range(0, size, 2**20):
        file.write(bytes(min(size, 2**20)))
  return str(path)


@pytest.mark.parametrize(
  ("members", "message"),
  [
    ([("a/test_batch.bin", 512, 2**60)], "claims 1,152,921"),
    ([("a/test_batch.bin", 512, 512)], "test_batch.bin .*got 512 bytes"),
    ([("a/readme", 2**28, 2**28)], "claims 268,435,456 bytes"),
    ([("a/readme", 512, 2**40)], "claims 1,099,511"),
    ([("a/readme", 512, 2**20)], "truncated or damaged|got no data_batch_1"),
    ([("a/test_batch.bin/../../x", 0, 0)], "got no data_batch_1"),
  ],
)  # fmt: skip
def test_members_that_are_not_the_records_are_not_unpacked(
  tmp_path, members, message
):
  path = tar_of(tmp_path / "bomb.tar.gz", *members)
  tracemalloc.start()
  with pytest.raises(data.DataError, match=message):
    cifar.load("cifar10", path, check_sum=False)
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most < 2**24


def test_a_header_of_a_gibibyte_is_not_unpacked(tmp_path):
  path = tmp_path / "pax.tar.gz"
  member = tarfile.TarInfo("a")
  member.type, member.size = tarfile.XHDTYPE, 2**33
  with gzip.open(path, "wb", compresslevel=1) as file:
    file.write(member.tobuf(tarfile.GNU_FORMAT))
    for _ in range(256):
      file.write(bytes(2**20))
  with pytest.raises(data.DataError, match="unpacks to more than"):
    cifar.load("cifar10", str(path), check_sum=False)


def test_bad_arguments_are_named(tmp_path):
  with pytest.raises(ValueError, match="`name` must be one of cifar10"):
    cifar.load("cifar1000", str(tmp_path))
  with pytest.raises(data.DataError, match="that exists, got"):
    cifar.load("cifar10", str(tmp_path / "nothing"))

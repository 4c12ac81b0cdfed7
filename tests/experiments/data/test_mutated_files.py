"""Files with seeded damage: right arrays or one sentence, never a traceback."""

import io
import json
import re
import resource
import shutil
import tarfile
import time
import warnings
import zipfile

import numpy as np
from PIL import Image
from PIL import ImageOps
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import cifar
from fsam_optax.experiments.data import folder as folder_lib
from fsam_optax.experiments.data import npz

pytestmark = pytest.mark.slow

SECONDS, MEBIBYTES = 10, 1024


def mutated(content, rng):
  """Bytes flipped, cut off, put in or taken out, at one to four places."""
  content = bytearray(content)
  for _ in range(rng.integers(1, 5)):
    if not content:
      break
    at = int(rng.integers(len(content)))
    # Half of the damage to the first and the last bytes, which say most.
    if rng.random() < 0.5:
      at = int(rng.integers(-150, 150)) % len(content)
    kind = rng.integers(5)
    if kind == 0:
      content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
      content[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
    elif kind == 2:
      content[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 3:
      del content[at : at + int(rng.integers(1, 9))]
    elif rng.random() < 0.3:
      del content[at:]
  return bytes(content)


def outcome(load):
  """What was read; None for a sentence; and never much time and memory."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  start = time.perf_counter()
  try:
    return load()
  except data.DataError as error:
    message = str(error)
  finally:
    assert time.perf_counter() - start < SECONDS
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < MEBIBYTES * 1024
  assert message.isprintable()
  assert "must" in message
  return None


def labels_of(y, y_train):
  if y.ndim == 2:
    return y.argmax(axis=1)
  if y.dtype.kind in "US":
    return [sorted(set(y_train.tolist())).index(word) for word in y.tolist()]
  return y


def expect_arrays(path, images):
  """By zipfile and numpy alone."""
  with zipfile.ZipFile(path) as archive:
    assert len(set(archive.namelist())) == len(archive.namelist())
    arrays = {}
    for name in ("x_train", "x_test", "y_train", "y_test"):
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arrays[name] = np.lib.format.read_array(
          io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False
        )
  for name, array in arrays.items():
    found = getattr(images, name)
    if name[0] == "y":
      expected = labels_of(array, arrays["y_train"])
    else:
      expected = array[..., None] if array.ndim == 3 else array
      if any("channels first" in note for note in images.notes):
        expected = expected.transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(found, expected)


EDITS = [
  (rb"\d", lambda rng: str(rng.integers(10)).encode()),
  (rb"[<|]([uif])\d", lambda rng: rng.choice([b"<i8", b"|u1", b">f4", b"<f2"])),
  (rb"[<|]([uif])\d", lambda rng: rng.choice([b"|O8", b"<U2", b"|S8", b"|V8"])),
  (rb"False", lambda rng: rng.choice([b"True ", b"None ", b"1    "])),
  (rb"\(", lambda rng: rng.choice([b"(-", b"((", b"[", b"(9" + b"9" * 30])),
  (rb", \}", lambda rng: rng.choice([b"}", b", 'a': 1, }", b", } + 1"])),
]


def edited(content, rng):
  """The same archive, with its arrays' headers changed and checksums right."""
  whole = io.BytesIO()
  target = f"{rng.choice(['x_train', 'y_train', 'x_test', 'y_test'])}.npy"
  with (
    zipfile.ZipFile(io.BytesIO(content)) as old,
    zipfile.ZipFile(whole, "w") as new,
    warnings.catch_warnings(),
  ):
    warnings.simplefilter("ignore")  # Names that come twice.
    for name in old.namelist():
      member = old.read(name)
      compression = int(rng.choice([0, 8, 12, 14]))
      if name == target:
        kind = rng.integers(4)
        if kind == 0:
          member = mutated(member, rng)
        elif kind == 1:
          new.writestr(name, member, compression)
        else:
          pattern, draw = EDITS[rng.integers(len(EDITS))]
          places = list(re.finditer(pattern, member[:128]))
          if places:
            at = places[rng.integers(len(places))]
            member = (
              member[: at.start()] + bytes(draw(rng)) + member[at.end() :]
            )
      new.writestr(name, member, compression)
  return whole.getvalue()


def test_npz_with_damage_is_read_right_or_refused(tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / "a.npz"
  bases = []
  for save in (np.savez, np.savez_compressed):
    for y in (np.arange(12) % 3, np.array(["cat", "dog", "owl"] * 4)):
      content = io.BytesIO()
      x = rng.integers(0, 256, (12, 5, 4), np.uint8)
      save(content, x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])
      bases.append(content.getvalue())
  right = 0
  for i in range(2000):
    base = bases[i % len(bases)]
    path.write_bytes((edited if i % 2 else mutated)(base, rng))
    images = outcome(lambda: npz.load(str(path)))
    if images is not None:
      expect_arrays(path, images)
      right += 1
  assert 100 < right < 1500


def picture(path):
  with Image.open(path) as image:
    turned = ImageOps.exif_transpose(image)
    return np.asarray(turned.convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp"])
def test_images_with_damage_are_read_right_or_refused(tmp_path, suffix):
  rng = np.random.default_rng(1)
  exif = Image.Exif()
  exif[0x0112] = 3
  for split in ("train", "test"):
    for name in ("a", "b"):
      path = tmp_path / split / name / f"1.{suffix}"
      path.parent.mkdir(parents=True)
      pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
      Image.fromarray(pixels).save(path, exif=exif)
  whole, right = path.read_bytes(), 0
  for _ in range(300):
    path.write_bytes(mutated(whole, rng))
    images = outcome(lambda: folder_lib.load(str(tmp_path)))
    if images is not None:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = picture(path)
      np.testing.assert_array_equal(images.x_test[1], expected)
      right += 1
  assert right > 0


@pytest.fixture(name="small")
def fixture_small(tmp_path, monkeypatch):
  """A version of CIFAR with few records, as a folder and as an archive."""
  published = cifar.FORMATS["cifar100"]
  small = published._replace(train={"train.bin": 4}, test={"test.bin": 2})
  monkeypatch.setitem(cifar.FORMATS, "cifar100", small)
  rng = np.random.default_rng(2)
  source = tmp_path / small.folder
  source.mkdir()
  for name, rows in (("train.bin", 4), ("test.bin", 2)):
    table = rng.integers(0, 20, (rows, 3074), np.uint8)
    (source / name).write_bytes(table.tobytes())
  archive = tmp_path / "whole.tar.gz"
  with tarfile.open(archive, "w:gz") as file:
    file.add(source, arcname=source.name)
  return source, archive


def expect_records(images, train, test):
  for content, x, y in (
    (train, images.x_train, images.y_train),
    (test, images.x_test, images.y_test),
  ):
    table = np.frombuffer(content, np.uint8).reshape(-1, 3074)
    np.testing.assert_array_equal(y, table[:, 1])
    channels = x.transpose(0, 3, 1, 2).reshape(len(x), -1)
    np.testing.assert_array_equal(channels, table[:, 2:])


def test_records_with_damage_are_read_right_or_refused(small):
  folder, _ = small
  rng = np.random.default_rng(3)
  whole, right = (folder / "test.bin").read_bytes(), 0
  for _ in range(300):
    content = mutated(whole, rng)
    (folder / "test.bin").write_bytes(content)
    images = outcome(lambda: cifar.load("cifar100", str(folder)))
    if images is not None:
      expect_records(images, (folder / "train.bin").read_bytes(), content)
      right += 1
  assert 0 < right < 300


def test_archives_with_damage_are_read_right_or_refused(small, tmp_path):
  folder, archive = small
  rng = np.random.default_rng(4)
  path = tmp_path / "cifar-100-binary.tar.gz"
  records = [(folder / f"{x}.bin").read_bytes() for x in ("train", "test")]
  with tarfile.open(archive) as file:
    file.extractall(tmp_path / "unpacked", filter="data")
  plain = tmp_path / "plain.tar"
  with tarfile.open(plain, "w", format=tarfile.PAX_FORMAT) as file:
    for x in ("train", "test"):
      member = file.gettarinfo(folder / f"{x}.bin")
      member.pax_headers = {"comment": json.dumps([x])}
      with (folder / f"{x}.bin").open("rb") as content:
        file.addfile(member, content)
  wholes = [archive.read_bytes(), plain.read_bytes()]
  for i in range(400):
    content = mutated(wholes[i % 2], rng)
    path.write_bytes(content)
    images = outcome(lambda: cifar.load("cifar100", str(path), check_sum=False))
    if images is None:
      continue
    if i % 2 == 0:  # Its checksum vouches for the records.
      expect_records(images, *records)
      continue
    with tarfile.open(path) as file:
      found = {
        member.name.rpartition("/")[2]: file.extractfile(member).read()
        for member in file
        if member.isreg()
      }
    expect_records(images, found["train.bin"], found["test.bin"])
  shutil.rmtree(tmp_path / "unpacked")

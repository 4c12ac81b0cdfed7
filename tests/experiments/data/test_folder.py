"""The reader of image folders, and of one image file."""

import os

import numpy as np
from PIL import EpsImagePlugin
from PIL import Image
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import folder as folder_lib

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 2**16, (5, 7), np.uint16)
COLOR = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def write(path, seed=0, size=(12, 10), mode="RGB"):
  path.parent.mkdir(parents=True, exist_ok=True)
  shape = (*size, 3) if mode == "RGB" else size
  pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  Image.fromarray(pixels).save(path)


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
  (tmp_path / "train" / "labels.csv").write_text("text")
  return tmp_path


def expect(message, folder):
  with pytest.raises(data.DataError, match=message) as error:
    folder_lib.load(str(folder))
  assert str(error.value).isprintable()


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


def test_folder_is_scaled_to_a_size(folder):
  write(folder / "train" / "dog" / "wide.jpg", size=(40, 90))
  expect(r"dog/wide\.jpg' of 40 x 90 pixels.*--image-size 10", folder)
  write(folder / "train" / "dog" / "gray.png", size=(30, 30), mode="L")
  images = folder_lib.load(str(folder), 8)
  assert images.x_train.shape == (11, 8, 8, 3)
  # Of the dogs 0, 1, 2, gray and wide, after three cats.
  is_gray = (images.x_train[3:8] == images.x_train[3:8, ..., :1]).all((1, 2, 3))
  np.testing.assert_array_equal(is_gray, [False, False, False, True, False])


def test_damaged_images_are_named(folder):
  path = folder / "train" / "dog" / "1.png"
  for content in (path.read_bytes()[:200], b"text"):
    path.write_bytes(content)
    expect(r"dog/1\.png', which cannot be read", folder)


@pytest.mark.parametrize(
  ("make", "at", "message"),
  [
    (os.mkdir, "test/c\x1b]w", r"got c\\x1b\]w, which train does not"),
    (os.mkdir, "test/dog", "got none in .*test/dog"),
    (os.mkdir, "train/cat/more", "cat/more', which cannot be read as one"),
    (write, "train/stray.png", r"3 subfolders .* the images \['stray\.png'\]"),
  ],
)
def test_what_does_not_belong_is_named(folder, make, at, message):
  make(folder / at)
  expect(message, folder)


def test_folders_without_what_they_must_hold_are_named(folder):
  (folder / "test").rename(folder / "val")
  assert len(folder_lib.load(str(folder)).y_test) == 2
  (folder / "val").rename(folder / "else")
  expect("must hold a folder train and beside it one of the name test", folder)
  expect("must hold a folder train", folder / "nothing")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm", "MM.tif"])
def test_of_sixteen_bits_the_upper_ones_are_taken(tmp_path, suffix):
  path = tmp_path / f"wide.{suffix}"
  if suffix == "pgm":
    path.write_bytes(b"P5 7 5 65535\n" + WIDE.astype(">u2").tobytes())
  elif suffix == "MM.tif":  # With the upper byte first.
    content = WIDE.astype(">u2").tobytes()
    Image.frombytes("I;16B", (7, 5), content).save(path)
  else:
    Image.fromarray(WIDE).save(path)
  np.testing.assert_array_equal(folder_lib.read(path)[..., 1], WIDE // 256)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_more_than_sixteen_bits_are_refused_by_name(tmp_path, dtype):
  path = tmp_path / "deep.tif"
  Image.fromarray(WIDE.astype(dtype)).save(path)
  with pytest.raises(data.DataError, match=r"deep\.tif' of the mode [FI]\."):
    folder_lib.read(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_eight_bits_of_every_mode_are_as_pillow_converts_them(tmp_path, mode):
  path = tmp_path / "some.tif"
  Image.fromarray(COLOR).convert(mode).save(path)
  with Image.open(path) as image:
    expected = np.asarray(image.convert("RGB"))
  np.testing.assert_array_equal(folder_lib.read(path), expected)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_the_orientation_of_a_camera_is_applied(tmp_path, suffix):
  path, exif = tmp_path / f"turned.{suffix}", Image.Exif()
  turns = {1: 0, 3: 2, 6: 3, 8: 1}
  options = {"lossless": True} if suffix == "webp" else {}
  for orientation, turn in turns.items():
    exif[0x0112] = orientation
    Image.fromarray(COLOR).save(path, exif=exif, **options)
    pixels = folder_lib.read(path, shape=np.rot90(COLOR, turn).shape)
    np.testing.assert_array_equal(pixels, np.rot90(COLOR, turn))


def test_other_decoders_are_never_chosen(tmp_path, monkeypatch):
  ghostscript = lambda *_: pytest.fail("Ghostscript was run")
  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
  path = tmp_path / "x.png"
  head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
  path.write_bytes(head)
  with pytest.raises(data.DataError, match=r"of JPEG, PNG, .*cannot be read"):
    folder_lib.read(path)

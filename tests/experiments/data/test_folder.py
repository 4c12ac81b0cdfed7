"""The reader of image folders, and of one image file."""

import struct

import numpy as np
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
  (tmp_path / "train" / "labels.csv").write_text("text")
  return tmp_path


def expect(message, folder, size=None):
  with pytest.raises(data.DataError, match=message) as error:
    folder_lib.load(str(folder), size)
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
    expect(r"dog/1\.png', which cannot be read", folder, 8)


def make_folder(path):
  path.mkdir(parents=True)


@pytest.mark.parametrize(
  ("make", "at", "message"),
  [
    (make_folder, "test/c\x1b]w", r"got c\\x1b\]w, which train does not"),
    (make_folder, "test/dog", "got none in .*test/dog"),
    (make_folder, "train/cat/more", "cat/more', which cannot be read as one"),
    (
      write,
      "train/stray.png",
      r"3 subfolders .* beside them the images \['stray\.png'\]",
    ),
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


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_of_sixteen_bits_the_upper_ones_are_taken(folder, suffix):
  path = folder / "train" / "dog" / f"1.{suffix}"
  (folder / "train" / "dog" / "1.png").unlink()
  values = np.arange(120, dtype=np.uint16).reshape(12, 10) * 546
  if suffix == "pgm":
    path.write_bytes(b"P5 10 12 65535\n" + values.astype(">u2").tobytes())
  else:
    Image.fromarray(values).save(path)
  images = folder_lib.load(str(folder))
  np.testing.assert_array_equal(images.x_train[4, ..., 1], values // 256)


def test_sixteen_bits_of_color_are_scaled_alike(tmp_path):
  path = tmp_path / "wide.ppm"
  wide = RNG.integers(0, 2**16, (5, 7, 3), np.uint16)
  path.write_bytes(b"P6 7 5 65535\n" + wide.astype(">u2").tobytes())
  pixels = folder_lib.read(path)
  np.testing.assert_allclose(pixels, wide / 257, atol=1)


def tiff(order, bits, content):
  """A TIFF of 7 x 5 gray pixels without Pillow."""
  tags = [
    (256, 3, 7), (257, 3, 5), (258, 3, bits), (259, 3, 1), (262, 3, 1),
    (273, 4, 200), (277, 3, 1), (278, 3, 5), (279, 4, len(content)),
  ]  # fmt: skip
  found = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(
    f"{order}IH", 8, len(tags)
  )
  for tag, kind, value in tags:
    found += struct.pack(f"{order}HHI", tag, kind, 1)
    found += struct.pack(f"{order}{'HH' if kind == 3 else 'I'}",
                         *(value, 0)[: 5 - kind])  # fmt: skip
  return (found + bytes(4)).ljust(200, b"\0") + content


def test_both_orders_of_bytes_are_read_and_twelve_bits_refused(tmp_path):
  path = tmp_path / "wide.tif"
  for order in "<>":
    path.write_bytes(tiff(order, 16, WIDE.astype(f"{order}u2").tobytes()))
    pixels = folder_lib.read(path)
    np.testing.assert_array_equal(pixels[..., 0], WIDE // 256)
  path.write_bytes(tiff("<", 12, bytes(5 * 11)))
  with pytest.raises(data.DataError, match=r"of the mode I;16\. Convert it"):
    folder_lib.read(path)


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
  from PIL import EpsImagePlugin

  def run(*_):
    raise AssertionError("Ghostscript was run")

  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
  path = tmp_path / "x.png"
  head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
  path.write_bytes(head)
  with pytest.raises(data.DataError, match=r"of JPEG, PNG, .*cannot be read"):
    folder_lib.read(path)

"""The reader of one image file."""

import pathlib
import struct
import warnings
import zlib

import numpy as np
from PIL import Image
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import pictures

RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 2**16, (5, 7), np.uint16)
COLOR = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def chunk(kind, content):
  crc = zlib.crc32(kind + content)
  return (
    struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
  )


def png(header, rows):
  """A PNG without Pillow: its header, and its rows without a filter."""
  content = b"".join(b"\0" + row for row in rows)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(content))
    + chunk(b"IEND", b"")
  )


def refuse(path, message):
  with pytest.raises(data.DataError, match=message) as error:
    pictures.read(path)
  assert str(error.value).isprintable()


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_of_gray_are_scaled_by_their_range(tmp_path, suffix):
  path = tmp_path / f"wide.{suffix}"
  if suffix == "pgm":
    path.write_bytes(b"P5 7 5 65535\n" + WIDE.astype(">u2").tobytes())
  else:
    Image.fromarray(WIDE).save(path)
  pixels, is_reduced = pictures.read(path)
  assert is_reduced
  np.testing.assert_array_equal(pixels, np.stack([WIDE // 256] * 3, -1))


def test_sixteen_bits_of_color_are_scaled_alike(tmp_path):
  path = tmp_path / "wide.png"
  wide = RNG.integers(0, 2**16, (5, 7, 3), np.uint16)
  header = struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0)
  path.write_bytes(png(header, [row.astype(">u2").tobytes() for row in wide]))
  pixels, is_reduced = pictures.read(path)
  assert is_reduced
  np.testing.assert_array_equal(pixels, wide // 256)


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


@pytest.mark.parametrize("order", ["<", ">"])
def test_both_orders_of_bytes_are_read_alike(tmp_path, order):
  path = tmp_path / "wide.tif"
  path.write_bytes(tiff(order, 16, WIDE.astype(f"{order}u2").tobytes()))
  pixels, _ = pictures.read(path)
  np.testing.assert_array_equal(pixels[..., 0], WIDE // 256)


def test_twelve_bits_are_not_taken_for_sixteen(tmp_path):
  path = tmp_path / "dark.tif"
  path.write_bytes(tiff("<", 12, bytes(5 * 11)))
  refuse(path, r"of the mode I;16\. Convert it to 8 bits")


@pytest.mark.parametrize(
  ("pixels", "mode"),
  [
    (RNG.normal(size=(5, 7)).astype(np.float32), r"F \(floating point\)"),
    (RNG.integers(0, 2**31, (5, 7), np.int32), r"I \(32 bits\)"),
  ],
)
def test_more_than_sixteen_bits_are_refused_by_name(tmp_path, pixels, mode):
  path = tmp_path / "deep.tif"
  Image.fromarray(pixels).save(path)
  refuse(path, rf"deep\.tif' of the mode {mode}\. Convert it to 8 bits")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK"])
def test_eight_bits_of_every_mode_are_as_pillow_converts_them(tmp_path, mode):
  path = tmp_path / "some.tif"
  Image.fromarray(COLOR).convert(mode).save(path)
  with Image.open(path) as image:
    expected = np.asarray(image.convert("RGB"))
  pixels, is_reduced = pictures.read(path)
  assert not is_reduced
  np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(
  ("orientation", "turn"),
  [
    (1, lambda x: x),
    (3, lambda x: x[::-1, ::-1]),
    (6, lambda x: np.rot90(x, -1)),
    (8, np.rot90),
  ],
)
@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_the_orientation_of_a_camera_is_applied(
  tmp_path, orientation, turn, suffix
):
  path = tmp_path / f"turned.{suffix}"
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"lossless": True} if suffix == "webp" else {}
  Image.fromarray(COLOR).save(path, exif=exif, **options)
  np.testing.assert_array_equal(pictures.read(path).pixels, turn(COLOR))


def test_other_decoders_are_never_chosen(tmp_path, monkeypatch):
  path = tmp_path / "x.png"
  path.write_bytes(
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
  )
  from PIL import EpsImagePlugin

  def run(*_):
    raise AssertionError("Ghostscript was run")

  monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
  refuse(path, r"x\.png', which cannot be read .*none of JPEG, PNG, WEBP")
  Image.fromarray(COLOR).save(path, "TGA")
  refuse(path, "none of JPEG")


def test_avif_is_none_of_the_formats(tmp_path):
  path = tmp_path / "x.avif"
  path.write_bytes(b"\0\0\0\x1cftypavif" + bytes(100))
  refuse(path, "none of JPEG")


@pytest.mark.parametrize("side", [10_000, 100_000, 2**31 - 1])
def test_claimed_pixels_are_counted_before_they_are_decoded(tmp_path, side):
  path = tmp_path / "bomb.png"
  header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
  path.write_bytes(png(header, []))
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    refuse(path, "pixels|bomb|decompression")


@pytest.mark.parametrize("target", ["/dev/zero", "none", "/"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, target):
  path = tmp_path / "x.png"
  path.symlink_to(target)
  refuse(path, "must be a (regular file|file that exists), got .*Repair it or")


def test_names_are_written_out(tmp_path):
  path = pathlib.Path(tmp_path) / "x\x1b[31m\u202e.png"
  path.write_bytes(b"text")
  refuse(path, r"x\\x1b\[31m\\u202e\.png")

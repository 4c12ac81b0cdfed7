"""A user's own arrays in an .npz."""

import io
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import npz


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
    (_set("y_train", lambda y: y.astype(object)), r"as with astype\(str\)"),
    (_set("y_train", lambda y: y.reshape(2, 20)), r"\[2, 20\]"),
    (_set("y_train", lambda y: y.reshape(4, 5, 2)), "one label a row"),
    (_set("y_test", lambda y: y[0]), "one label a row"),
    (_set("y_test", lambda y: y.astype("M8[s]")), "datetime64"),
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
  with pytest.raises(data.DataError, match=message):
    data.load(str(path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04xx"])
def test_file_that_is_no_archive_is_refused(tmp_path, content):
  path = tmp_path / "bad.npz"
  path.write_bytes(content)
  with pytest.raises(data.DataError, match="must be an archive of arrays"):
    data.load(str(path))


def test_bare_array_and_missing_file_are_refused(tmp_path):
  path = tmp_path / "bare.npz"
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(data.DataError, match="must be an archive of arrays"):
    data.load(str(path))
  with pytest.raises(data.DataError, match="must be a file that exists"):
    data.load(str(tmp_path / "none.npz"))


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
  assert images.x_train.dtype == np.float64
  np.testing.assert_array_equal(images.x_train, arrays["x_train"])
  assert npz.load(str(path), image_size=4).image_shape == (4, 4, 3)


def test_vectors_have_no_image_shape(tmp_path, arrays):
  path = tmp_path / "vectors.npz"
  np.savez(path, **arrays)
  assert npz.load(str(path)).image_shape is None
  with pytest.raises(data.DataError, match="rows of 6 features"):
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
    ({"x_train": np.array([{}] * 10)}, "without unpickling it"),
  ],
)
def test_images_that_do_not_fit_are_named(tmp_path, changes, message):
  path = tmp_path / "images.npz"
  save(path, **changes)
  with pytest.raises(data.DataError, match=message):
    npz.load(str(path))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_that_come_first_are_put_last(tmp_path, channels):
  path = tmp_path / "first.npz"
  rng = np.random.default_rng(0)
  draw = lambda rows: rng.integers(0, 256, (rows, channels, 8, 6), np.uint8)
  arrays = save(path, x_train=draw(10), x_test=draw(4))
  images = npz.load(str(path))
  assert images.image_shape == (8, 6, channels)
  for row, place in ((0, (2, 5)), (9, (7, 1))):
    np.testing.assert_array_equal(
      images.x_train[row][place], arrays["x_train"][row, :, *place]
    )
  np.testing.assert_array_equal(
    images.x_test[3, 4], arrays["x_test"][3, :, 4].T
  )
  (note,) = images.notes
  assert f"as 8 x 6 x {channels}, channels last" in note
  # The other order is as it was, and says nothing.
  save(path, x_train=np.moveaxis(arrays["x_train"], 1, 3),
       x_test=np.moveaxis(arrays["x_test"], 1, 3))  # fmt: skip
  last = npz.load(str(path))
  assert not last.notes
  assert last.fingerprint() == images.fingerprint()


@pytest.mark.parametrize(
  "shape", [(3, 8, 3), (1, 8, 1), (3, 8, 1), (1, 1, 3), (4, 8, 8), (2, 9, 9)]
)
def test_channels_that_may_be_first_or_last_are_refused(tmp_path, shape):
  path = tmp_path / "either.npz"
  rng = np.random.default_rng(0)
  save(path, x_train=rng.normal(size=(10, *shape)),
       x_test=rng.normal(size=(4, *shape)))  # fmt: skip
  with pytest.raises(
    data.DataError, match=r"first or last.*x\.transpose\(0, 2, 3, 1\)"
  ):
    npz.load(str(path))


def test_an_image_size_is_never_passed_over(tmp_path):
  path = tmp_path / "images.npz"
  arrays = save(path)
  half = npz.load(str(path), image_size=4)
  assert half.image_shape == (4, 4, 1)
  np.testing.assert_allclose(
    half.x_train[3, 1, 2, 0], arrays["x_train"][3, 2:4, 4:6].mean(), rtol=1e-6
  )
  with pytest.raises(data.DataError, match="--image-size 3 divides"):
    npz.load(str(path), image_size=3)
  with pytest.raises(data.DataError, match="--image-size 16 divides"):
    npz.load(str(path), image_size=16)


def test_what_float32_does_not_hold_stays_in_float64(tmp_path):
  path = tmp_path / "wide.npz"
  rng = np.random.default_rng(0)
  x = 1e9 + rng.normal(size=(14, 5))
  save(path, x_train=x[:10], x_test=x[10:])
  np.testing.assert_array_equal(npz.load(str(path)).x_train, x[:10])
  x = 2**30 + rng.integers(0, 9, (14, 5))
  save(path, x_train=x[:10], x_test=x[10:])
  np.testing.assert_array_equal(npz.load(str(path)).x_train, x[:10])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", "<f2", ">i8", "<u2", "i1"])
def test_every_order_of_bytes_and_axes_is_read(tmp_path, dtype, order):
  path = tmp_path / "order.npz"
  rng = np.random.default_rng(0)
  x = np.asarray(rng.integers(0, 100, (14, 5)), dtype)
  save(path, x_train=np.array(x[:10], order=order), x_test=x[10:])
  images = npz.load(str(path))
  np.testing.assert_array_equal(images.x_train, x[:10])
  np.testing.assert_array_equal(images.x_test, x[10:])


def header(text, version=1):
  text = text.encode("latin1")
  length = len(text).to_bytes(2 if version == 1 else 4, "little")
  return b"\x93NUMPY" + bytes([version, 0]) + length + text


def damaged(path, member, content, compression=zipfile.ZIP_STORED):
  """An archive of which one member is replaced."""
  good = path.with_name("good.npz")
  save(good)
  with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w") as new:
    for name in old.namelist():
      is_it = name == member
      new.writestr(
        name, content if is_it else old.read(name), compression if is_it else 0
      )
  return path


def describe(shape, descr="'<f4'"):
  return header(
    f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
  )


@pytest.mark.parametrize(
  ("content", "message"),
  [
    # 58 TiB, of which the file has 4 bytes.
    (describe((10, 2**21, 2**20)) + bytes(4), "what its header says"),
    (describe((-1, -4)) + bytes(16), "what its header says"),
    (describe((10, 8, 8)) + bytes(2559), "got 2,559"),
    (describe((10, 8, 8)) + bytes(2561), "got 2,561"),
    (describe((10, 8), "'|O'") + bytes(640), "without unpickling"),
    (describe((10, 2), "('<f4', (100,))") + bytes(8000), "numeric dtype"),
    (describe((10,), "[('a', '<f4'), ('b', '<f4')]") + bytes(80), "numeric"),
    (describe("1e9"), "cannot be read as one"),
    (describe("("), "cannot be read as one"),
    (describe("(" * 5000), "cannot be read as one"),
    (describe((10, 8), "'<x9'"), "cannot be read as one"),
    (header("{}"), "cannot be read as one"),
    (header("x" * 60_000), "cannot be read as one"),
    (b"\x93NUMPY\x03\x00" + bytes(20), "version"),
    (b"text", "cannot be read as one"),
    (b"", "cannot be read as one"),
  ],
)
def test_a_header_that_lies_is_refused(tmp_path, content, message):
  path = damaged(tmp_path / "bad.npz", "x_train.npy", content)
  refuse(path, message)


def refuse(path, message):
  with pytest.raises(data.DataError, match=message) as error:
    npz.load(str(path))
  assert "\n" not in str(error.value)


def test_what_unpacks_to_more_than_memory_is_not_unpacked(
  tmp_path, monkeypatch
):
  # Honest: the header, the archive and the content agree on 64 MiB.
  content = describe((2**24, 1)) + bytes(2**26)
  path = damaged(
    tmp_path / "bomb.npz", "x_train.npy", content, zipfile.ZIP_DEFLATED
  )
  assert path.stat().st_size < 2**17
  monkeypatch.setattr(bounds, "available_memory", lambda: 2**25)
  tracemalloc.start()
  refuse(path, "must fit into memory, 0.0 GiB, got the arrays of .*bomb.npz")
  most = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert most < 2**22


def test_what_claims_tebibytes_in_both_places_is_not_begun(tmp_path):
  content = describe((2**21, 2**23)) + bytes(100)
  path = damaged(tmp_path / "vast.npz", "x_train.npy", b"")
  with zipfile.ZipFile(path) as old:
    others = {x: old.read(x) for x in old.namelist() if x != "x_train.npy"}
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("x_train.npy", content, zipfile.ZIP_DEFLATED)
    archive.infolist()[0].file_size = len(content) - 100 + 2**46
    for name, member in others.items():
      archive.writestr(name, member)
  refuse(path, r"must fit into memory, .*196,608\.0 GiB\. Save fewer rows")


def test_a_size_that_the_archive_lies_about_is_refused(tmp_path):
  path = tmp_path / "lie.npz"
  save(path)
  content = bytearray(path.read_bytes())
  at = content.rindex(b"PK\x01\x02")  # The entry of the last array.
  content[at + 24 : at + 28] = (2**31).to_bytes(4, "little")
  path.write_bytes(content)
  refuse(path, "must")


@pytest.mark.parametrize(
  "compression",
  [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
   zipfile.ZIP_LZMA],
)  # fmt: skip
def test_damage_inside_of_an_array_is_found(tmp_path, compression):
  whole = tmp_path / "whole.npz"
  arrays = save(whole)
  content = io.BytesIO()
  np.save(content, arrays["x_train"])
  path = damaged(
    tmp_path / "packed.npz", "x_train.npy", content.getvalue(), compression
  )
  np.testing.assert_array_equal(
    npz.load(str(path)).x_train[..., 0], arrays["x_train"]
  )
  found = bytearray(path.read_bytes())
  start = found.index(b"x_train.npy")
  for at in range(start + 200, start + 600, 40):
    found[at] ^= 0x10
  path.write_bytes(found)
  refuse(path, "cannot be read as one")


@pytest.mark.parametrize(
  ("offset", "value", "message"),
  [(10, 99, "compression"), (8, 1, "encrypted|password")],
)
def test_unknown_compression_and_encryption_are_refused(
  tmp_path, offset, value, message
):
  path = tmp_path / "bad.npz"
  save(path)
  content = bytearray(path.read_bytes())
  at = content.index(b"PK\x01\x02")
  content[at + offset] = value
  content[offset - 2] = value
  path.write_bytes(content)
  refuse(path, message)


def test_an_array_that_is_there_twice_is_refused(tmp_path):
  path = tmp_path / "twice.npz"
  save(path)
  with (
    zipfile.ZipFile(path, "a") as archive,
    pytest.warns(UserWarning, match="Duplicate name"),
  ):
    archive.writestr("y_test.npy", archive.read("y_test.npy"))
  refuse(path, "one array `y_test`, got 2 of that name")


def test_a_directory_of_an_archive_is_bounded(tmp_path):
  path = tmp_path / "many.npz"
  save(path)
  with zipfile.ZipFile(path, "a") as archive:
    for i in range(20):
      archive.writestr(f"{i}" + "x" * 60_000, b"")
  refuse(path, "directory is larger than a MiB")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
  os.mkfifo(tmp_path / "pipe.npz")
  refuse(tmp_path / "pipe.npz", "which is a pipe")
  (tmp_path / "zero.npz").symlink_to("/dev/zero")
  refuse(tmp_path / "zero.npz", "which is a device")
  (tmp_path / "folder.npz").mkdir()
  refuse(tmp_path / "folder.npz", "which is a folder")
  (tmp_path / "dead.npz").symlink_to(tmp_path / "nothing")
  refuse(tmp_path / "dead.npz", "which is a link to nothing")
  refuse(tmp_path / ("x" * 300), "File name too long")
  refuse("nul\0.npz", "null byte")


def test_a_sparse_file_is_not_read(tmp_path):
  path = tmp_path / "sparse.npz"
  with path.open("wb") as file:
    file.write(b"PK\x03\x04")
    file.truncate(40 * 2**30)
  refuse(path, "cannot be read as one")


def test_names_with_escape_sequences_do_not_reach_the_terminal(tmp_path):
  path = tmp_path / "a\x1b[2Jb\n.npz"
  path.write_bytes(b"text")
  with pytest.raises(data.DataError, match=r"a\\x1b\[2Jb\\n") as error:
    npz.load(str(path))
  assert str(error.value).isprintable()
  save(path)
  assert npz.load(str(path)).name.isprintable()

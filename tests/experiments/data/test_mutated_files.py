"""Files with seeded damage: right arrays or one sentence, never a traceback."""

import functools
import io
import warnings
import zipfile

import numpy as np
from PIL import Image
from PIL import ImageOps
import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.data import folder as folder_lib
from fsam_optax.experiments.data import npz

pytestmark = pytest.mark.slow


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


def archive(root, rng):
  """An .npz of images, and how NumPy alone reads it."""
  path, names = root / "a.npz", ("x_train", "x_test", "y_train", "y_test")
  x = rng.integers(0, 256, (12, 5, 4), np.uint8)
  y = np.arange(12) % 3
  np.savez(path, x_train=x, y_train=y, x_test=x[:6], y_test=y[:6])

  def read():
    with zipfile.ZipFile(path) as file:
      found = [
        np.lib.format.read_array(io.BytesIO(file.read(f"{name}.npy")))
        for name in names
      ]
    return *(x[..., None] for x in found[:2]), *found[2:]

  get = lambda images: tuple(getattr(images, name) for name in names)
  return path, lambda: get(npz.load(str(path))), read


def picture(root, rng, suffix):
  """A folder with an image that is turned, and how Pillow alone reads it."""
  exif = Image.Exif()
  exif[0x0112] = 3
  for place in ("train/a", "train/b", "test/a", "test/b"):
    path = root / place / f"1.{suffix}"
    path.parent.mkdir(parents=True)
    pixels = rng.integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)

  def read():
    with Image.open(path) as image:
      return (np.asarray(ImageOps.exif_transpose(image).convert("RGB")),)

  return path, lambda: (folder_lib.load(str(root)).x_test[1],), read


KINDS = {
  "npz": (archive, 1000),
  **{
    suffix: (functools.partial(picture, suffix=suffix), 200)
    for suffix in ("png", "jpg", "tif", "gif", "bmp")
  },
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_with_damage_are_read_right_or_refused(kind, tmp_path):
  make, number = KINDS[kind]
  rng = np.random.default_rng(0)
  path, load, read = make(tmp_path, rng)
  whole, refusals = path.read_bytes(), []
  for _ in range(number):
    path.write_bytes(mutated(whole, rng))
    try:
      found = load()
    except data.DataError as error:
      refusals.append(str(error))
      continue
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      expected = read()
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_array_equal(one, other)
  assert 0 < len(refusals) < number
  for refusal in refusals:
    assert refusal.isprintable()
    assert "must" in refusal

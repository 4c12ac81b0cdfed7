"""The data sets by name. To add one: its file."""

import os
from typing import Optional

from fsam_optax.experiments.common import registry
from fsam_optax.experiments.data import images

REGISTRY: dict[str, images.DataSet] = registry.of(
  "fsam_optax.experiments.data", images.DataSet
)


def load(
  source: str,
  *,
  image_size: Optional[int] = None,
  otherwise: Optional[str] = None,
) -> images.Images:
  """Reads a data set.

  Args:
    source: a name such as ``"mnist"``; a path that one of the data sets
      recognizes; or both, such as ``"cifar10:data/cifar-10-batches-bin"``.
    image_size: side in pixels to scale the images to; None to leave them.
    otherwise: the data set of a path that none recognizes.

  Raises:
    DataError: if there is no such data set, or it is not what it must be.
  """
  name, path = _resolve(source, otherwise)
  return REGISTRY[name].read(path, image_size).resized(image_size)


def describe() -> str:
  """The data sets and how to name them, for a help text."""
  return "; ".join(f"{x.spelling}: {x.about}" for x in REGISTRY.values())


def name_of(source: str) -> str:
  """The name of the data set that :func:`load` would read."""
  return _resolve(source, None)[0]


def _resolve(
  source: str, otherwise: Optional[str]
) -> tuple[str, Optional[str]]:
  name, colon, path = source.partition(":")
  if name in REGISTRY and REGISTRY[name].takes_path == bool(colon and path):
    return name, path or None
  for dataset in REGISTRY.values():
    if dataset.recognizes(source):
      return dataset.name, source
  is_path = source not in REGISTRY and os.path.exists(source)
  # An archive that is missing is said to be by who would read it.
  if otherwise and (is_path or source.endswith((".tar.gz", ".tgz"))):
    return otherwise, source
  spellings = sorted(dataset.spelling for dataset in REGISTRY.values())
  raise images.DataError(
    f"must be one of {', '.join(spellings)}, the path of an .npz or that of a "
    f"folder with train/CLASS/ and test/CLASS/, got {source!r}"
    f"{'' if is_path or source in REGISTRY else ', where nothing lies'}"
  )

"""A path that is of no data set: what was found there, and what is expected."""

import os
import pathlib
from typing import Optional

from fsam_optax.experiments.data import bounds
from fsam_optax.experiments.data import cifar
from fsam_optax.experiments.data import folder
from fsam_optax.experiments.data import pictures
from fsam_optax.experiments.data.images import DataError

_ARCHIVES = (".tar.gz", ".tgz", ".tar")


def explain(path: str, otherwise: Optional[str]) -> Optional[DataError]:
  """Says why a path cannot be read, unless the reader of CIFAR shall say it.

  Args:
    path: that no data set recognizes.
    otherwise: what it would be read as, such as ``"cifar100"``, if anything.

  Returns:
    The error; None where the path may hold a version of CIFAR.
  """
  remedy = _expected(otherwise)
  if os.path.isdir(path):
    return _explain_folder(pathlib.Path(path), remedy)
  if not os.path.lexists(path):
    return DataError(
      "must be a folder or an archive that exists, or the name of a data set, "
      f"got {path!r}, which is neither. {remedy}"
    )
  try:
    bounds.size_of(path, remedy)
  except DataError as error:
    return error
  if otherwise in cifar.FORMATS and path.lower().endswith(_ARCHIVES):
    return None
  return DataError(
    f"must be a folder, an archive of CIFAR or an .npz, got the file {path!r}. "
    f"{remedy}"
  )


def _expected(otherwise: Optional[str]) -> str:
  cifars = (
    f"{cifar.FORMATS[otherwise].archive} or the folder that it unpacks to, "
    if otherwise in cifar.FORMATS
    else "".join(f"{name}:PATH, " for name in cifar.FORMATS)
  )
  return (
    f"Hand over {cifars}a folder with train/CLASS/ and test/CLASS/, or an .npz"
  )


def _explain_folder(path: pathlib.Path, remedy: str) -> Optional[DataError]:
  try:
    paths = folder.visible(path)
  except DataError as error:
    return error
  if cifar.is_known(path):
    return None
  for found in paths:
    if os.path.isdir(found) and found.name.lower() in ("train", "training"):
      return DataError(
        f"must name the folder of its training images train, got {str(found)!r}"
        f". Rename it, and the other to {' or '.join(folder.TEST_FOLDERS)}"
      )
  classes = [p.name for p in paths if os.path.isdir(p) and _has_images(p)]
  if classes:
    return DataError(
      f"must hold train/CLASS/ and test/CLASS/, got {len(classes)} folders of "
      f"images without a split in {str(path)!r}: {folder.shown(classes)}. Move "
      "them into a folder train, and a part of their images into test"
    )
  images = [p.name for p in paths if p.suffix.lower() in pictures.SUFFIXES]
  if images:
    return DataError(
      f"must hold train/CLASS/ and test/CLASS/, got {len(images)} images "
      f"without a class in {str(path)!r}: {folder.shown(images)}. Sort them "
      "into such folders"
    )
  found = folder.shown(p.name for p in paths) or "nothing"
  return DataError(
    f"must hold a data set, got {found} in {str(path)!r}. {remedy}"
  )


def _has_images(path: pathlib.Path) -> bool:
  try:
    with os.scandir(path) as entries:
      return any(
        os.path.splitext(entry.name)[1].lower() in pictures.SUFFIXES
        for entry in entries
      )
  except OSError:
    return False

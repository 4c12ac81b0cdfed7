"""The data sets by name: how each is read, and what is known of it unread."""

from collections.abc import Callable
from typing import NamedTuple, Optional

from fsam_optax.experiments.datasets.images import DataError
from fsam_optax.experiments.datasets.images import Images


class Sizes(NamedTuple):
  """What is known of a data set before it is read.

  Attributes:
    train: number of training rows.
    test: number of test rows.
    image: height, width and channels.
    classes: number of classes.
  """

  train: int
  test: int
  image: tuple[int, int, int]
  classes: int


class SeedRows(NamedTuple):
  """The rows that each seed draws, where many small runs train at once.

  Attributes:
    train: to train on.
    validation: to choose hyperparameters by; all others are its test rows.
  """

  train: int
  validation: int


class DataSet(NamedTuple):
  """A data set, as its file declares it.

  Attributes:
    name: what commands call it.
    about: for a help text, such as ``"1,797 digits, 8 x 8"``.
    read: from a path, or None, and a side in pixels, or None, to the images.
      Raises :class:`DataError`.
    takes_path: whether it is read from a path.
    recognizes: whether a path, without a name, is one of these.
    sizes: None where they are not known before.
    seed_rows: None where the source has test rows of its own; a fifth of its
      training rows are for validation then.
  """

  name: str
  about: str
  read: Callable[[Optional[str], Optional[int]], Images]
  takes_path: bool = False
  recognizes: Callable[[str], bool] = lambda path: False
  sizes: Optional[Sizes] = None
  seed_rows: Optional[SeedRows] = None

  @property
  def spelling(self) -> str:
    """How a command names it, such as ``"mnist"`` or ``"cifar10:PATH"``."""
    return f"{self.name}:PATH" if self.takes_path else self.name


REGISTRY: dict[str, DataSet] = {}


def register(dataset: DataSet) -> DataSet:
  """Enters a data set into :data:`REGISTRY`, under its name.

  Args:
    dataset: what a file of this room declares.

  Returns:
    The same.
  """
  REGISTRY[dataset.name] = dataset
  return dataset


def load(
  source: str,
  *,
  image_size: Optional[int] = None,
  otherwise: Optional[str] = None,
) -> Images:
  """Reads a data set by its name, by a path, or by both.

  Args:
    source: a name such as ``"mnist"``; a path that one of the data sets
      recognizes; or both, such as ``"cifar10:data/cifar-10-batches-bin"``.
    image_size: side in pixels to scale the images to; None to leave them.
    otherwise: the name of what a path is read as that none recognizes.

  Returns:
    The images.

  Raises:
    DataError: if the source is none of these, or is not what it must be.
    MissingExtraError: if a package that it needs is not installed.
  """
  name, path = _resolve(source, otherwise)
  return REGISTRY[name].read(path, image_size)


def describe() -> str:
  """The data sets and how to name them, for a help text."""
  return "; ".join(f"{x.spelling}: {x.about}" for x in REGISTRY.values())


def name_of(source: str, otherwise: Optional[str] = None) -> str:
  """The name of the data set that :func:`load` would read.

  Args:
    source: see :func:`load`.
    otherwise: see :func:`load`.

  Returns:
    The name.

  Raises:
    DataError: if the source is no data set.
  """
  return _resolve(source, otherwise)[0]


def _resolve(
  source: str, otherwise: Optional[str]
) -> tuple[str, Optional[str]]:
  name, colon, path = source.partition(":")
  if name in REGISTRY and REGISTRY[name].takes_path == bool(colon and path):
    return name, path or None
  for dataset in REGISTRY.values():
    if dataset.recognizes(source):
      return dataset.name, source
  if otherwise is not None and source not in REGISTRY:
    return otherwise, source
  spellings = sorted(dataset.spelling for dataset in REGISTRY.values())
  raise DataError(
    f"must be one of {', '.join(spellings)}, the path of an .npz or that of a "
    f"folder with train and test in it, got {source!r}"
  )

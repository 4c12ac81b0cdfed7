"""What a data set declares: how it is read, and what is known of it unread."""

from collections.abc import Callable
from typing import NamedTuple, Optional

from fsam_optax.experiments.data.images import Images


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

"""Flags from types: a dataclass becomes the flags and the help of a command.

The fields of the dataclass are the flags, its ``Attributes:`` their help texts,
and annotations of :mod:`~fsam_optax.experiments.common.values` say what a value
must be. tyro does the rest. What must hold between two flags is code of the
command, which raises a :class:`FlagError`.
"""

from typing import Sequence, TypeVar

import tyro

T = TypeVar("T")


class FlagError(ValueError):
  """A value of a flag that a command cannot work with."""

  def __init__(self, flag: str, message: object) -> None:
    """For example ``("--rho", "must be positive, got 0. Choose 0.05")``."""
    super().__init__(f"argument {flag}: {message}")


def parse(settings: type[T], argv: Sequence[str], *, program: str,
          description: str) -> T:  # fmt: skip
  """Makes an instance of a dataclass from the arguments of a command.

  Fields that are dataclasses are the groups of the help. The help ends the
  process with status 0, an error with status 2.
  """
  return tyro.cli(
    settings,
    prog=program,
    description=description,
    args=list(argv),
    config=(tyro.conf.OmitArgPrefixes,),
  )

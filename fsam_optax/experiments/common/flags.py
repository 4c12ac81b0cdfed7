"""Flags from types: a dataclass becomes the flags and the help of a command.

The fields of the dataclass are the flags, its ``Attributes:`` their help texts,
and annotations of :mod:`~fsam_optax.experiments.common.values` say what a value
must be. tyro does the rest. What must hold between two flags is code of the
command, which raises a :class:`FlagError`.
"""

import sys
from typing import Any, Callable, NamedTuple, NoReturn, Sequence, TypeVar

import tyro

T = TypeVar("T")
PROGRAM = "python -m fsam_optax"


class FlagError(ValueError):
  """A value of a flag that a command cannot work with."""

  def __init__(self, flag: str, message: object) -> None:
    """For example ``("--rho", "must be positive, got 0. Choose 0.05")``."""
    super().__init__(f"argument {flag}: {message}")


class Command(NamedTuple):
  """A command of ``python -m fsam_optax``.

  Attributes:
    name: its word on the command line.
    help: one line, without a capital or a full stop.
    settings: dataclass of its flags.
    run: takes an instance of it; may raise a :class:`FlagError`.
  """

  name: str
  help: str
  settings: type
  run: Callable[[Any], None]

  @property
  def program(self) -> str:
    """What the command calls itself in its messages."""
    return f"{PROGRAM} {self.name}"


def end(program: str, message: object) -> NoReturn:
  """Ends the process with a line on stderr and status 2."""
  print(f"{program}: error: {message}", file=sys.stderr)
  sys.exit(2)


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

"""Flags from types: a dataclass becomes the flags and the help of a command.

The fields of the dataclass are the flags, its ``Attributes:`` their help texts,
and annotations of :mod:`~fsam_optax.experiments.common.values` say what a value
must be. tyro does the rest. What must hold between two flags is code of the
command, which raises a :class:`FlagError`.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import sys
from typing import Any, NamedTuple, NoReturn, TypeVar

import tyro

from fsam_optax.experiments.common import values

T = TypeVar("T")
PROGRAM = "python -m fsam_optax"


class FlagError(ValueError):
  """A value of a flag that a command cannot work with.

  Attributes:
    flag: such as ``"--rho"``.
  """

  def __init__(self, flag: str, message: object) -> None:
    """Names the flag, what must hold, what came and the remedy.

    Args:
      flag: such as ``"--rho"``.
      message: such as ``"must be positive, got 0. Choose 0.05"``.
    """
    super().__init__(f"argument {flag}: {message}")
    self.flag = flag


class Command(NamedTuple):
  """A command of ``python -m fsam_optax``.

  Attributes:
    name: its word on the command line.
    help: one line, without a capital or a full stop.
    settings: dataclass of its flags.
    run: does the work, from an instance of ``settings``. It may raise
      :class:`FlagError`.
  """

  name: str
  help: str
  settings: type
  run: Callable[[Any], None]

  @property
  def program(self) -> str:
    """What the command calls itself in its messages."""
    return f"{PROGRAM} {self.name}"


def end(program: str, message: object, status: int = 2) -> NoReturn:
  """Ends the process with a line on stderr.

  Args:
    program: such as :attr:`Command.program`.
    message: what went wrong.
    status: of the process; 2 is for a bad flag.

  Raises:
    SystemExit: always.
  """
  print(f"{program}: error: {message}", file=sys.stderr)
  sys.exit(status)


def parse(settings: type[T], argv: Sequence[str], *, program: str,
          description: str) -> T:  # fmt: skip
  """Makes the settings of a command from its arguments.

  Args:
    settings: a dataclass. Its fields may be dataclasses in their turn, which
      are the groups of the help.
    argv: the arguments.
    program: see :attr:`Command.program`.
    description: one sentence, for the head of the help.

  Returns:
    An instance of the dataclass.

  Raises:
    FlagError: if a value is not what its annotation says.
    SystemExit: with status 0 after the help, 2 for what is no flag.
  """
  found = tyro.cli(
    settings,
    prog=program,
    description=description,
    args=list(argv),
    config=(tyro.conf.OmitArgPrefixes,),
  )
  _check(found)
  return found


def _check(settings: Any, name: str = "") -> None:
  """Raises for the first value that was refused."""
  if isinstance(settings, values.Refused):
    raise FlagError(name, settings.message)
  if dataclasses.is_dataclass(settings):
    for field in dataclasses.fields(settings):
      # What has no default is written without its name.
      is_positional = field.default is field.default_factory
      dashes = "" if is_positional else "--"
      flag = f"{dashes}{field.name.replace('_', '-')}"
      _check(getattr(settings, field.name), flag)

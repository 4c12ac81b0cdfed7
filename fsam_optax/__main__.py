"""``python -m fsam_optax``: the experiments from the command line."""

import argparse
from collections.abc import Sequence
import sys
from typing import Optional

from fsam_optax.experiments import compare
from fsam_optax.experiments import extras
from fsam_optax.experiments import study
from fsam_optax.experiments import train
from fsam_optax.experiments import tune

_COMMANDS = (compare, tune, study, train)


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Runs one command.

  Args:
    argv: the arguments; those of the process where None.

  Raises:
    SystemExit: with status 2 for a bad flag, 1 for a missing package, 130
      where it was interrupted.
  """
  parser = argparse.ArgumentParser(
    prog="python -m fsam_optax",
    description="Experiments with F-SAM, against SAM and SGD.",
  )
  subparsers = parser.add_subparsers(
    title="commands", required=True, metavar="COMMAND", dest="command"
  )
  for command in _COMMANDS:
    subparser = subparsers.add_parser(
      command.NAME,
      help=command.HELP,
      description=command.HELP[0].upper() + command.HELP[1:] + ".",
    )
    command.add_flags(subparser)
    subparser.set_defaults(run=command.run, parser=subparser)
  args = parser.parse_args(argv)
  try:
    args.run(args, args.parser)
  except extras.MissingExtraError as error:
    sys.exit(f"{args.parser.prog}: error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)


if __name__ == "__main__":
  main()

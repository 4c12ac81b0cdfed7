"""``python -m fsam_optax``: the experiments from the command line."""

from collections.abc import Sequence
import sys
from typing import Any, Optional

from fsam_optax.experiments.common import extras

_PROGRAM = "python -m fsam_optax"


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Runs one command.

  Args:
    argv: the arguments; those of the process where None.

  Raises:
    SystemExit: with status 2 for a bad flag, 1 for a missing package, 130
      where it was interrupted.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  try:
    extras.require("tyro")
    commands = {command.name: command for command in _commands()}
    if words and words[0] in ("-h", "--help"):
      print(_overview(commands))
    elif words and words[0] in commands:
      _run(commands[words[0]], words[1:])
    else:
      sys.stderr.write(
        f"{_PROGRAM}: error: COMMAND must be one of {', '.join(commands)}, got "
        f"{words[0] if words else 'none'!r}; --help says what they do\n"
      )
      sys.exit(2)
  except extras.MissingExtraError as error:
    sys.exit(f"{_PROGRAM}: error: {error}")
  except KeyboardInterrupt:
    sys.exit(130)


def _commands() -> Sequence[Any]:
  """The commands, which need what the core does not."""
  from fsam_optax.experiments.studies import compare
  from fsam_optax.experiments.studies import study_command as study
  from fsam_optax.experiments.studies import tune
  from fsam_optax.experiments.train import start as train

  return (compare.COMMAND, tune.COMMAND, study.COMMAND, train.COMMAND)


def _overview(commands: dict[str, Any]) -> str:
  lines = [f"  {name:9}{command.help}" for name, command in commands.items()]
  return (
    f"usage: {_PROGRAM} [-h] COMMAND ...\n\n"
    "Experiments with F-SAM, against SAM and SGD.\n\n"
    "commands\n" + "\n".join(lines) + f"\n\n{_PROGRAM} COMMAND --help shows "
    "the flags of a command."
  )


def _run(command: Any, words: Sequence[str]) -> None:
  from fsam_optax.experiments.common import flags

  try:
    command.run(
      flags.parse(
        command.settings,
        words,
        program=command.program,
        description=f"{command.help[0].upper()}{command.help[1:]}.",
      )
    )
  except flags.FlagError as error:
    flags.end(command.program, error)


if __name__ == "__main__":
  main()

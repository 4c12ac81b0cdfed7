"""``python -m fsam_optax``: the experiments from the command line."""

from collections.abc import Sequence
import difflib
import importlib
import os
import sys
from typing import Any, Optional

from fsam_optax.experiments.common import terminal

_PROGRAM = "python -m fsam_optax"
_MODULES = {
  "compare": "studies.compare",
  "tune": "studies.tune",
  "study": "studies.study_command",
  "train": "train.main",
}


def main(argv: Optional[Sequence[str]] = None) -> None:
  """Runs one command.

  Args:
    argv: the arguments; those of the process where None.

  Raises:
    SystemExit: with status 2 for a bad flag, 1 for a missing package. The
      process ends with 130 where it was interrupted.
  """
  words = list(sys.argv[1:] if argv is None else argv)
  try:
    with terminal.outliving_streams():
      _choose(words)
  except ModuleNotFoundError as error:
    name = str(error.name).partition(".")[0]
    sys.exit(
      f"{_PROGRAM}: error: the experiments need {name}, which is not "
      'installed. Run in the clone: pip install -e ".[experiments]"'
    )
  except KeyboardInterrupt:
    sys.stderr.write(f"\n{_PROGRAM}: interrupted\n")
    sys.stderr.flush()
    # At once: Python's own end crashes where XLA is compiling on a thread.
    os._exit(130)


def _choose(words: Sequence[str]) -> None:
  """Runs the command that the first word names, or says which there are."""
  if not words or words[0] in ("-h", "--help"):
    print(_overview())
  elif words[0] in _MODULES:
    _run(_command(words[0]), words[1:])
  else:
    remedy = "--help says what they do"
    for meant in difflib.get_close_matches(words[0], _MODULES, n=1):
      remedy = f"did you mean {meant}?"
    sys.stderr.write(
      f"{_PROGRAM}: error: COMMAND must be one of {', '.join(_MODULES)}, got "
      f"{words[0]!r}; {remedy}\n"
    )
    sys.exit(2)


def _command(name: str) -> Any:
  """A command, whose module needs what the core does not."""
  module = f"fsam_optax.experiments.{_MODULES[name]}"
  return importlib.import_module(module).COMMAND


def _overview() -> str:
  lines = [f"  {name:9}{_command(name).help}" for name in _MODULES]
  return (
    f"usage: {_PROGRAM} [-h] COMMAND ...\n\n"
    "Experiments with F-SAM, against SAM and SGD.\n\n"
    "commands\n" + "\n".join(lines) + f"\n\n{_PROGRAM} COMMAND --help shows "
    "the flags of a command."
  )


def _run(command: Any, words: Sequence[str]) -> None:
  import jax

  from fsam_optax.experiments.common import flags

  try:
    settings = flags.parse(
      command.settings,
      words,
      program=command.program,
      description=f"{command.help[0].upper()}{command.help[1:]}.",
    )
    if jax.config.values["jax_disable_jit"]:
      message = "JAX_DISABLE_JIT must not be set: every command compiles"
      flags.end(command.program, message)
    command.run(settings)
  except flags.FlagError as error:
    flags.end(command.program, error)


if __name__ == "__main__":
  main()

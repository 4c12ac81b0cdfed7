"""``python -m fsam_optax``: the experiments from the command line."""

from collections.abc import Sequence
import difflib
import importlib
import os
import sys
from typing import Any, Optional

from fsam_optax.experiments.common.terminal import PROGRAM
from fsam_optax.experiments.common.terminal import end
from fsam_optax.experiments.common.terminal import outliving_streams

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
    with outliving_streams():
      _choose(words)
  except ModuleNotFoundError as error:
    name = str(error.name).partition(".")[0]
    sys.exit(
      f"{PROGRAM}: error: the experiments need {name}, which is not "
      'installed. Run in the clone: pip install -e ".[experiments]"'
    )
  except KeyboardInterrupt:
    sys.stderr.write(f"\n{PROGRAM}: interrupted\n")
    sys.stderr.flush()
    # At once: Python's own end crashes where XLA is compiling on a thread.
    os._exit(130)


def _choose(words: Sequence[str]) -> None:
  """Runs the command that the first word names, or says which there are."""
  if not words or words[0] in ("-h", "--help"):
    lines = [f"  {name:9}{_help(name)}" for name in _MODULES]
    print(
      f"usage: {PROGRAM} [-h] COMMAND ...\n\n"
      "Experiments with F-SAM, against SAM and SGD.\n\n"
      "commands\n" + "\n".join(lines) + f"\n\n{PROGRAM} COMMAND --help "
      "shows the flags of a command."
    )
  elif words[0] in _MODULES:
    _run(words[0], words[1:])
  else:
    remedy = "--help says what they do"
    for meant in difflib.get_close_matches(words[0], _MODULES, n=1):
      remedy = f"did you mean {meant}?"
    names = ", ".join(_MODULES)
    end(PROGRAM, f"COMMAND must be one of {names}, got {words[0]!r}; {remedy}")


def _command(name: str) -> Any:
  """The module of a command, which needs what the core does not.

  ``Settings`` are its flags. ``run`` takes them, and begins with the help.
  """
  return importlib.import_module(f"fsam_optax.experiments.{_MODULES[name]}")


def _help(name: str) -> str:
  return (_command(name).run.__doc__ or "").partition("\n")[0]


def _run(name: str, words: Sequence[str]) -> None:
  import jax

  from fsam_optax.experiments.common import flags

  command, program = _command(name), f"{PROGRAM} {name}"
  try:
    settings = flags.parse(
      command.Settings, words, program=program, description=_help(name)
    )
    if jax.config.values["jax_disable_jit"]:
      end(program, "JAX_DISABLE_JIT must not be set: every command compiles")
    command.run(settings)
  except flags.FlagError as error:
    end(program, error)


if __name__ == "__main__":
  main()

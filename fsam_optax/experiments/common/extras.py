"""The optional dependencies, and what to do where one is missing."""

import importlib


class MissingExtraError(ImportError):
  """A package of the ``experiments`` extra is not installed."""


def require(*names: str) -> None:
  """Raises unless every one of these packages can be imported.

  Args:
    *names: names to import, such as ``"sklearn"``.

  Raises:
    MissingExtraError: in one line, with the command that installs them.
  """
  for name in names:
    try:
      importlib.import_module(name)
    except ImportError as error:
      raise MissingExtraError(
        f"the experiments need {name}, which cannot be imported ({error}). "
        'Run in the clone: pip install -e ".[experiments]"'
      ) from error

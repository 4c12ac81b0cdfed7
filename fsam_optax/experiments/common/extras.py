"""The optional dependencies, and what to do where one is missing."""

import importlib.util


class MissingExtraError(ImportError):
  """A package of the ``experiments`` extra is not installed."""


def require(*names: str) -> None:
  """Raises unless every one of these packages is installed.

  None is imported yet: some take a second, and are needed at the end.

  Args:
    *names: names to import, such as ``"sklearn"``.

  Raises:
    MissingExtraError: in one line, with the command that installs them.
  """
  for name in names:
    try:
      is_there = importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # Its parent is not, or it is None.
      is_there = False
    if not is_there:
      raise MissingExtraError(
        f"the experiments need {name}, which is not installed. Run in the "
        'clone: pip install -e ".[experiments]"'
      )

"""The studies by name: one question each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fsam_optax.experiments.studies.arms import Context


class Study(NamedTuple):
  """A study, as its file declares it.

  Attributes:
    name: what the command calls it.
    question: one line.
    run: from what it works on to what the JSON holds: ``results``, ``tables``,
      the ``panels`` of the figure, and what its ``config`` says otherwise.
    seeds: to report by default.
  """

  name: str
  question: str
  run: Callable[[Context], dict[str, Any]]
  seeds: int = 64


REGISTRY: dict[str, Study] = {}


def register(study: Study) -> Study:
  """Enters a study into :data:`REGISTRY`, under its name.

  Args:
    study: what a file of this room declares.

  Returns:
    The same.
  """
  REGISTRY[study.name] = study
  return study

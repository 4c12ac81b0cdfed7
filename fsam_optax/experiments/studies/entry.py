"""What a study declares: its question, and how it is answered."""

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

"""What a study declares: its question, its arms, and what it reports."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any, NamedTuple

from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.arms import Arm
from fsam_optax.experiments.lab.laboratory import Lab


class Study(NamedTuple):
  """A study, as its file declares it.

  Attributes:
    name: what the command calls it.
    question: one line.
    run: from the laboratory of its arms to what the JSON holds: ``results``,
      ``tables``, the ``panels`` of the figure, and what its ``config`` says
      otherwise.
    arms: the ways to train that it compares, by name.
    seeds: to report by default.
    first_seed: of them.
  """

  name: str
  question: str
  run: Callable[[Lab], dict[str, Any]]
  arms: Mapping[str, Arm] = {}
  seeds: int = 64
  first_seed: int = 2000


def side_by_side(
  others: Sequence[str], what: str = ""
) -> Callable[[Lab], dict[str, Any]]:
  """The run of a study whose arms are searched, tested and compared.

  Args:
    others: arms that the rest is compared with.
    what: the arms are.
  """

  def run(lab: Lab) -> dict[str, Any]:
    results = lab.results()
    return {
      "results": results,
      "tables": [paired_report.arms_table(results, others, what)],
      "panels": [paired_report.bars(results)],
    }

  return run

"""What a study declares: its question, its arms, its settings, its report."""

import dataclasses
from typing import Any, Callable, Mapping, NamedTuple, Optional, Sequence

from fsam_optax.experiments import networks
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import shared_flags
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.arms import Arm
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.store import Results
from fsam_optax.experiments.lab.store import Row


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is trained on what.

  Attributes:
    title: of it in the tables.
    dataset: its name.
    model: name of a network; one that the registry lacks needs a ``network``
      among the changes.
    label_noise: fraction of wrong training labels.
    best: points around which searches begin in place of the tuned values.
    changes: of the laboratory.
    images: makes more changes, from a laboratory with those; by default it has
      the pool of the data set.
  """

  title: str
  dataset: str = "mnist"
  model: str = "mlp"
  label_noise: float = tuned_values.LABEL_NOISE
  best: Mapping[str, Point] = dataclasses.field(default_factory=dict)
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  images: Optional[Callable[[Lab], Mapping[str, Any]]] = None

  def at(self, lab: Lab) -> Lab:
    """The laboratory at this setting."""
    name = self.model if self.model in networks.REGISTRY else "mlp"
    recipe = tuned_values.recipe(self.dataset, name)
    changes: dict[str, Any] = {
      "model": self.model,
      "network": networks.REGISTRY[name].create,
      "label_noise": self.label_noise,
      "epochs": recipe.epochs,
      "best": {**recipe.best, **self.best},
      **self.changes,
    }
    if lab.is_quick:
      del changes["epochs"]
    here = lab.at(**changes)
    if self.images is None:
      data = shared_flags.Data(self.dataset, model=name)
      return here.at(pool=shared_flags.load(data))
    return here.at(**self.images(here))

  def results(self, rows: Sequence[Row]) -> dict[str, Row]:
    """The tested arms among rows."""
    fields = {
      "phase": "test",
      "dataset": self.dataset,
      "model": self.model,
      "label_noise": self.label_noise,
      **self.changes.get("described", {}),
    }
    if "batch_size" in self.changes:
      fields["batch_size"] = self.changes["batch_size"]
    return {row["arm"]: row for row in rows if fields.items() <= row.items()}


def searched_by(seeds: Sequence[int], first: int) -> dict[str, Any]:
  """Changes for a search by a few of the seeds first, which its rows name."""
  return {
    "search_seeds": seeds[:first],
    "more_seeds": seeds[first:],
    "described": {"search_seeds": list(seeds)},
  }


class Study(NamedTuple):
  """A study, as its file declares it.

  Attributes:
    name: what the command calls it.
    question: one line.
    arms: the ways to train that it compares, by name.
    report: from the tested arms of each setting to what the JSON holds:
      ``results``, ``tables``, the ``panels`` of the figure, and changes of
      ``config``; by default a row an arm.
    settings: in which every arm is searched and tested.
    without_search: trains in a setting what follows from its tested arms.
    run: what a study does that does something else, from the laboratory of its
      arms on the MNIST digits to what the JSON holds.
    seeds: to report by default.
    first_seed: of them.
  """

  name: str
  question: str
  arms: Mapping[str, Arm] = {}
  report: Callable[[Results], dict[str, Any]] = paired_report.by_arm
  settings: Sequence[Setting] = (Setting("mnist, mlp"),)
  without_search: Callable[[Lab], None] = lambda lab: None
  run: Optional[Callable[[Lab], dict[str, Any]]] = None
  seeds: int = 64
  first_seed: int = 2000

  def answer(self, lab: Lab) -> dict[str, Any]:
    """What the JSON holds, after what there was to train."""
    if self.run is not None:
      return self.run(lab)
    for setting in self.settings[: 1 if lab.is_quick else None]:
      here = setting.at(lab)
      for name in lab.arms:
        here.test(name)
      self.without_search(here)
    seeds = list(lab.seeds)
    return self.of_rows([x for x in lab.store.read() if x["seeds"] == seeds])

  def of_rows(self, rows: Sequence[Row]) -> dict[str, Any]:
    """What the JSON holds of the settings that rows say something of."""
    # In the order of the arms; those of no search, by a rule, stand last.
    place = {name: i for i, name in enumerate(self.arms)}
    rows = sorted(rows, key=lambda row: place.get(row["arm"], len(place)))
    results = {x.title: x.results(rows) for x in self.settings}
    results = {title: of for title, of in results.items() if of}
    tested = [row for of in results.values() for row in of.values()]
    config = {
      what: list(dict.fromkeys(row[what] for row in tested))
      for what in ("dataset", "model", "label_noise", "epochs", "batch_size")
    }
    found = self.report(results)
    # What a search tried, and what that gave, is in the rows alone.
    of_search = {"grid", "candidates"}
    for of in found["results"].values():
      for name, row in of.items():
        of[name] = {k: v for k, v in row.items() if k not in of_search}
    return {**found, "config": config}

"""``study``: the evidence for and against the paper, one question each."""

import dataclasses
import pathlib
from typing import Annotated, Optional

import tyro

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import registry
from fsam_optax.experiments.common import values
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import shared_flags
from fsam_optax.experiments.lab.store import Store
from fsam_optax.experiments.lab.study import Study

_SEARCH_SEEDS, FIRST_TO_REPORT = 16, 24
_OF_ONE_SETTING = {
  *("data", "input_shape", "train_size", "validation_size", "test_size"),
  *("classes", "search_seeds"),
}
REGISTRY: dict[str, Study] = registry.of(
  "fsam_optax.experiments.studies", Study
)
_QUESTIONS = "\n".join(f"{x.name}: {x.question}" for x in REGISTRY.values())


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags of ``study``.

  Attributes:
    study: which of the studies.
    quick: a few epochs, seeds and values, to see it run: its figures say
      nothing.
    seeds: number of seeds to report.
    first_seed: the first of them.
    arms: of a study that searches, which to train, each between quotes; all
      where none is named. The tables show what is there already.
    cifar10: images of cifar and of fine-tuning, as `train --data` has them.
    cifar100: images of cifar100, and those that fine-tuning begins with.
    output: directory to write NAME.json and NAME.png to. What is in its
      NAME.jsonl already is not trained again.
  """

  study: tyro.conf.Positional[
    Annotated[str, values.choice(REGISTRY), tyro.conf.arg(help=_QUESTIONS)]
  ]
  quick: bool = False
  seeds: Annotated[
    Optional[int], shared_flags.SEEDS, values.default("the study's")
  ] = None
  first_seed: Annotated[
    Optional[int],
    values.integer(
      FIRST_TO_REPORT,
      2**31,
      remedy="those below choose hyperparameters",
      metavar="SEED",
    ),
    values.default("the study's"),
  ] = None
  arms: tuple[str, ...] = ()
  cifar10: Optional[str] = None
  cifar100: Optional[str] = None
  output: pathlib.Path = pathlib.Path("studies")


def run(given: Settings) -> None:
  """Answers one question about F-SAM by training many small models."""
  study = REGISTRY[given.study]
  if given.arms and study.run is not None:
    raise flags.FlagError(
      "--arms", f"must be left out: {study.name} trains all that it compares"
    )
  if unknown := set(given.arms) - set(study.arms):
    raise flags.FlagError(
      "--arms",
      f"must be some of {', '.join(map(repr, study.arms))}, got "
      f"{min(unknown)!r}",
    )
  lab = shared_flags.laboratory(
    shared_flags.Settings(
      epochs=1 if given.quick else None,
      seeds=given.seeds or (2 if given.quick else None),
      first_seed=given.first_seed,
      output=given.output,
    ),
    study.seeds,
    study.first_seed,
  )
  file = study.name + "-quick" * given.quick  # It says nothing of the others.
  with progress.Bars() as bars:
    lab = lab.at(
      arms={name: study.arms[name] for name in given.arms or study.arms},
      search_seeds=range(1 if given.quick else _SEARCH_SEEDS),
      described={},
      is_quick=given.quick,
      store=Store(given.output / f"{file}.jsonl"),
      progress=bars.bar,
      sources={"cifar10": given.cifar10, "cifar100": given.cifar100},
    )
    found = study.answer(lab)
  # Each setting has its own images and search seeds.
  shared = lab.config().items()
  config = {k: v for k, v in shared if k not in _OF_ONE_SETTING} | {
    "quick": given.quick,
    "versions": files.versions("matfree"),
    **found.pop("config", {}),
  }
  described = {"study": study.name, "question": study.question}
  result = files.finite({**described, "config": config, **found})
  title = paired_report.title_of(config)
  print(f"{study.name}: {study.question}\n{title} from {config['seeds'][0]}")
  title = f"{study.name}: {title}"
  paired_report.publish(result, file, given.output, title)

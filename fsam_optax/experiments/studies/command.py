"""``study``: the evidence for and against the paper, one question each."""

import dataclasses
import math
import pathlib
import time
from typing import Annotated, Any, Optional

import tyro

from fsam_optax.experiments import studies
from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.common import values
from fsam_optax.experiments.seeds import one_run
from fsam_optax.experiments.seeds import plan
from fsam_optax.experiments.seeds import shared_flags
from fsam_optax.experiments.studies import arms
from fsam_optax.experiments.studies import report

_SEARCH_SEEDS = 16
_SEEDS = ", ".join(f"{x.name} {x.seeds}" for x in studies.REGISTRY.values())
_QUESTIONS = "\n".join(
  f"{x.name}: {x.question}" for x in studies.REGISTRY.values()
)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags of ``study``.

  Attributes:
    study: which of the studies.
    data: what is trained on what.
    quick: a few epochs, seeds and values, to see it run: its figures say
      nothing.
    seeds: number of seeds to report.
    first_seed: the first of them.
    epochs: passes over the training rows.
    output: directory to write NAME.json and NAME.png to.
  """

  study: tyro.conf.Positional[
    Annotated[
      str,
      values.choice(studies.REGISTRY, "NAME"),
      tyro.conf.arg(help=_QUESTIONS),
    ]
  ]
  data: shared_flags.Data = dataclasses.field(default_factory=shared_flags.Data)
  quick: bool = False
  seeds: Annotated[
    Optional[int], shared_flags.SEEDS, values.default(_SEEDS)
  ] = None
  first_seed: Annotated[
    int,
    values.integer(
      _SEARCH_SEEDS,
      2**31,
      remedy="those below choose hyperparameters",
      metavar="SEED",
    ),
  ] = 2000
  epochs: shared_flags.Epochs = None
  output: pathlib.Path = pathlib.Path("studies")


def run(given: Settings) -> None:
  """Runs the command.

  Args:
    given: its flags.

  Raises:
    FlagError: if they do not fit each other or the data.
  """
  extras.require("scipy.stats", "matplotlib.figure", "rich.progress", "matfree")
  study = studies.REGISTRY[given.study]
  with progress.Bars() as bars:
    context = _context(given, study.seeds, bars)
    plan.make_output(given.output)
    start = time.perf_counter()
    found = study.run(context)
  result = _finite(
    {
      "study": study.name,
      "question": study.question,
      "config": config(context, given.data) | found.pop("config", {}),
      **found,
    }
  )
  json_path = given.output / f"{study.name}.json"
  figure_path = given.output / f"{study.name}.png"
  print(
    f"{study.name}: {study.question}\n{context.pool.name}, {context.model}, "
    f"{report.noise_of(result['config'])}{len(context.seeds)} seeds from "
    f"{given.first_seed}, {context.epochs} epochs"
  )
  for table in result["tables"]:
    print(f"\n{tables.table(table['header'], table['rows'])}", flush=True)
  with files.saving(given.output):
    files.write_json(result, json_path)
    report.draw(result, figure_path)
  print(
    f"\nwrote {json_path} and {figure_path} in "
    f"{time.perf_counter() - start:.0f} s"
  )


COMMAND = flags.Command(
  name="study",
  help="answer one question about F-SAM by training many small models",
  settings=Settings,
  run=run,
)


def _context(given: Settings, seeds: int, bars: progress.Bars) -> arms.Context:
  """What a study works on, by its flags."""
  recipe = plan.recipe_of(given.data)
  pool = plan.load(given.data)
  number = 2 if given.quick else given.seeds or seeds
  return arms.Context(
    pool=pool,
    model=given.data.model,
    label_noise=given.data.label_noise,
    label_noise_kind=given.data.label_noise_kind,
    epochs=2 if given.quick else given.epochs or recipe.epochs,
    batch_size=min(recipe.batch_size, pool.train_size),
    search_seeds=range(1 if given.quick else _SEARCH_SEEDS),
    seeds=range(given.first_seed, given.first_seed + number),
    is_quick=given.quick,
    progress=bars.start,
  )


def config(context: arms.Context, data: shared_flags.Data) -> dict[str, Any]:
  """What the JSON says about how its numbers came to be.

  Args:
    context: what the study worked on.
    data: what the flags say of it.

  Returns:
    Values by name.
  """
  return {
    **plan.describe_data(context.pool, data),
    "momentum": one_run.MOMENTUM,
    "weight_decay": arms.UNTUNED_DECAY,
    "learning_rate_schedule": "cosine to 0, convergence excepted",
    "epochs": context.epochs,
    "batch_size": context.batch_size,
    "search_seeds": list(context.search_seeds),
    "seeds": list(context.seeds),
    "quick": context.is_quick,
    "accuracy_unit": "percent",
    "versions": files.versions("matfree"),
  }


def _finite(tree: Any) -> Any:
  """The tree with None for numbers that are not finite: JSON has none."""
  if isinstance(tree, dict):
    return {key: _finite(value) for key, value in tree.items()}
  if isinstance(tree, (list, tuple)):
    return [_finite(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree

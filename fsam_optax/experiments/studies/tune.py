"""``tune``: hyperparameters of each optimizer, chosen on validation rows."""

import dataclasses
from typing import Annotated, Any, Optional

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.common import values
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import settings
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.store import Store

_AROUND = values.default("a grid around the tuned values")


@dataclasses.dataclass(frozen=True)
class Tune:
  """The flags of ``tune``.

  Attributes:
    data: what is trained on what.
    training: how every run is trained.
    rho: radius of the perturbation, in units of the weights: one value or a
      grid of them, as in 0.2:0.4:0.8, for sam and fsam, or one for each, as in
      sam=0.35,fsam=0.5.
    learning_rate: learning rate at the first step, a cosine takes it to 0: one
      value or a grid of them, as in 0.002:0.004, for all, or one for each, as
      in sgd=0.004,fsam=0.015.
    weight_decay: fraction of the weights that is added to the gradient, in the
      same form.
    seeds: number of seeds, each with its own split, noise, initialization and
      batches, shared by the optimizers.
    first_seed: the first seed. Choose by `tune` and report by `compare` on
      seeds that differ.
  """

  data: settings.Data = dataclasses.field(default_factory=settings.Data)
  training: settings.Training = dataclasses.field(
    default_factory=settings.Training
  )
  rho: Annotated[values.PerOptimizer, settings.rho(is_grid=True), _AROUND] = (
    dataclasses.field(default_factory=dict)
  )
  learning_rate: Annotated[
    values.PerOptimizer, settings.learning_rate(is_grid=True), _AROUND
  ] = dataclasses.field(default_factory=dict)
  weight_decay: Annotated[
    values.PerOptimizer, settings.weight_decay(is_grid=True), _AROUND
  ] = dataclasses.field(default_factory=dict)
  seeds: Annotated[
    Optional[int],
    settings.SEEDS,
    values.default("16, 4 for the cnn on mnist"),
  ] = None
  first_seed: Annotated[int, settings.FIRST_SEED] = (
    tuned_values.TUNING_FIRST_SEED
  )


def run(given: Tune) -> None:
  """Runs the command.

  Args:
    given: its flags.

  Raises:
    FlagError: if they do not fit each other or the data.
  """
  extras.require("rich.progress")
  recipe = settings.recipe_of(given.data)
  names, output = given.training.optimizers, given.training.output
  grids = settings.grids(
    names,
    {what: getattr(given, what) for what in search.Grid._fields},
    {name: recipe.grid(name) for name in names},
  )
  lab = settings.laboratory(
    given.data,
    given.training,
    given.seeds or recipe.tuning_seeds,
    given.first_seed,
  ).at(store=Store(output / "tune.jsonl"))
  print(
    f"{lab.pool.name}, {lab.model}, label noise {lab.label_noise:g}: "
    f"validation accuracy %, {len(lab.seeds)} seeds from {lab.seeds[0]}\n",
    flush=True,
  )
  with progress.Bars() as bars:
    lab = lab.at(progress=bars.start)
    found = {name: lab.choose(name, grids[name]) for name in names}
  for name, of in found.items():
    print("\n\n".join(map(tables.text, _tables(name, of))) + "\n")
  for what in search.Point._fields:
    chosen = [
      f"{name}={getattr(of.best, what):g}"
      for name, of in found.items()
      if what != "rho" or name in optimizers.ASCENDING
    ]
    if chosen:
      print(f"--{what.replace('_', '-')} {','.join(chosen)}")
  for name, of in found.items():
    for what in of.on_edge:
      print(
        f"warning: the best {what} of {optimizers.label(name)}, "
        f"{getattr(of.best, what):g}, lies at the end of its values, which "
        f"went on {search.MOST_EXTENSIONS} times. Move the grid with "
        f"--{what.replace('_', '-')}"
      )
  result = {
    "config": lab.config() | {"optimizers": list(names)},
    "results": {name: _result(of) for name, of in found.items()},
  }
  path = output / "tune.json"
  with files.saving(output):
    files.write_json(result, path)
  print(f"wrote {path}")


COMMAND = flags.Command(
  name="tune",
  help="choose learning rate, radius and weight decay on validation rows",
  settings=Tune,
  run=run,
)


def _result(found: search.Found) -> dict[str, Any]:
  """Every point, the best, and which of its values lie at an end."""
  columns = zip(found.points, found.accuracy, found.diverged, strict=True)
  return {
    "best": found.best._asdict(),
    "on_edge": found.on_edge,
    "points": [
      {
        **point._asdict(),
        "validation_accuracy": accuracy.tolist(),
        "diverged": int(diverged),
      }
      for point, accuracy, diverged in columns
    ],
  }


def _tables(name: str, found: search.Found) -> list[dict[str, Any]]:
  """Learning rates by radii and by weight decays, the third at its best."""
  if name not in optimizers.ASCENDING:
    return [_table(name, found, "weight_decay", "rho")]
  return [
    _table(name, found, "rho", "weight_decay"),
    _table(name, found, "weight_decay", "rho"),
  ]


def _table(name: str, found: search.Found, column: str, fixed: str):
  best = getattr(found.best, fixed)
  at = {
    (point.learning_rate, getattr(point, column)): accuracy
    for point, accuracy in zip(found.points, found.accuracy, strict=True)
    if getattr(point, fixed) == best
  }
  title = f"{optimizers.label(name)}: learning rate \\ {column}"
  if fixed != "rho" or name in optimizers.ASCENDING:
    title += f", {fixed} {best:g}"
  columns = sorted({key[1] for key in at})
  rows = [
    [
      rate,
      *(
        paired_report.mean(at[rate, x]) if (rate, x) in at else "-"
        for x in columns
      ),
    ]
    for rate in sorted({key[0] for key in at})
  ]
  return {
    "title": title,
    "header": ["", *map("{:g}".format, columns)],
    "rows": rows,
  }

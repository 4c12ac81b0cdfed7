"""``tune``: hyperparameters of each optimizer, chosen on validation rows."""

import dataclasses
from typing import Annotated, Any, Optional

import numpy as np

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.common import values
from fsam_optax.experiments.seeds import plan as plan_lib
from fsam_optax.experiments.seeds import recipes
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import shared_flags

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

  data: shared_flags.Data = dataclasses.field(default_factory=shared_flags.Data)
  training: shared_flags.Training = dataclasses.field(
    default_factory=shared_flags.Training
  )
  rho: Annotated[
    values.PerOptimizer, shared_flags.rho(is_grid=True), _AROUND
  ] = dataclasses.field(default_factory=dict)
  learning_rate: Annotated[
    values.PerOptimizer, shared_flags.learning_rate(is_grid=True), _AROUND
  ] = dataclasses.field(default_factory=dict)
  weight_decay: Annotated[
    values.PerOptimizer, shared_flags.weight_decay(is_grid=True), _AROUND
  ] = dataclasses.field(default_factory=dict)
  seeds: Annotated[
    Optional[int],
    shared_flags.SEEDS,
    values.default("16, 4 for the cnn on mnist"),
  ] = None
  first_seed: Annotated[int, shared_flags.FIRST_SEED] = (
    recipes.TUNING_FIRST_SEED
  )


def run(given: Tune) -> None:
  """Runs the command.

  Args:
    given: its flags.

  Raises:
    FlagError: if they do not fit each other or the data.
  """
  extras.require("rich.progress")
  plan = plan_lib.make(given, is_grid=True)
  print(
    f"{plan.pool.name}, {plan.data.model}, label noise "
    f"{plan.data.label_noise:g}: validation accuracy %, {len(plan.seeds)} "
    f"seeds from {plan.seeds[0]}\n",
    flush=True,
  )
  result = tune(plan)
  path = plan.output / "tune.json"
  for optimizer, found in result["results"].items():
    print("\n\n".join(_tables(optimizer, found)) + "\n")
  best = {name: found["best"] for name, found in result["results"].items()}
  for name in search.Point._fields:
    chosen = {
      optimizer: point[name]
      for optimizer, point in best.items()
      if name != "rho" or optimizer in optimizers.ASCENDING
    }
    if chosen:
      values_of = ",".join(f"{k}={v:g}" for k, v in chosen.items())
      print(f"--{name.replace('_', '-')} {values_of}")
  for optimizer, found in result["results"].items():
    for name in found["on_edge"]:
      print(
        f"warning: the best {name} of {optimizers.label(optimizer)}, "
        f"{best[optimizer][name]:g}, lies at the end of its values, which went "
        f"on {search.MOST_EXTENSIONS} times. Move the grid with "
        f"--{name.replace('_', '-')}"
      )
  with files.saving(plan.output):
    files.write_json(result, path)
  print(f"wrote {path}")


COMMAND = flags.Command(
  name="tune",
  help="choose learning rate, radius and weight decay on validation rows",
  settings=Tune,
  run=run,
)


def tune(plan: plan_lib.Plan) -> dict[str, Any]:
  """Searches the hyperparameters of every optimizer.

  Args:
    plan: with a grid for each optimizer.

  Returns:
    What the JSON holds: ``config``, and ``results`` with every point, its
    validation accuracy after the last epoch by seed, the best point and which
    of its values lie at an end of those tried.
  """
  splits = plan.draw_splits()
  trainer = plan.make_trainer()
  results = {}
  with progress.Bars() as bars:
    for optimizer in plan.optimizers:
      start_bar = lambda total, name=optimizer: bars.start(
        optimizers.label(name), total
      )
      found = search.search(
        lambda points, name=optimizer, bar=start_bar: search.train(
          trainer, name, splits, points, start_bar=bar
        ),
        plan.grids[optimizer],
      )
      results[optimizer] = {
        "best": found.best._asdict(),
        "on_edge": found.on_edge,
        "points": [
          {
            **point._asdict(),
            "validation_accuracy": accuracy.tolist(),
            "diverged": int(diverged),
          }
          for point, accuracy, diverged in zip(
            found.points, found.accuracy, found.diverged, strict=True
          )
        ],
      }
  return {"config": plan.config(), "results": results}


def _tables(optimizer: str, found: dict[str, Any]) -> list[str]:
  """Learning rates by radii and by weight decays, the third at its best."""
  others = {"rho": "weight_decay", "weight_decay": "rho"}
  if optimizer not in optimizers.ASCENDING:
    del others["rho"]
  return [
    _table(optimizer, found, column, fixed) for column, fixed in others.items()
  ]


def _table(optimizer: str, found: dict[str, Any], column: str, fixed: str):
  best = found["best"][fixed]
  at = {
    (point["learning_rate"], point[column]): point["validation_accuracy"]
    for point in found["points"]
    if point[fixed] == best
  }
  columns = sorted({key[1] for key in at})
  title = f"{optimizers.label(optimizer)}: learning rate \\ {column}"
  if fixed != "rho" or optimizer in optimizers.ASCENDING:
    title += f", {fixed} {best:g}"
  rows = []
  for rate in sorted({key[0] for key in at}):
    cells = [at.get((rate, value)) for value in columns]
    rows.append(
      [f"{rate:g}"]
      + [
        "-"
        if x is None
        else tables.with_error(float(np.mean(x)), statistics.standard_error(x))
        for x in cells
      ]
    )
  return title + "\n" + tables.table(["", *(f"{x:g}" for x in columns)], rows)

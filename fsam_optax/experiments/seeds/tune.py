"""``tune``: learning rates and radii, chosen on the validation rows."""

import dataclasses
from typing import Annotated, Any, Optional

import jax
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
  seeds: Annotated[
    Optional[int],
    shared_flags.SEEDS,
    values.default(
      "16 for the mlp on mnist or other images, 48 on digits, 4 for the cnn"
    ),
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
  result = tune(plan)
  path = plan.output / "tune.json"
  print(
    f"validation accuracy %, {len(plan.seeds)} seeds from "
    f"{plan.seeds[0]}; rows are learning rates, columns radii\n"
  )
  for optimizer, grid in result["results"].items():
    print(f"{_table(optimizer, grid)}\n")
  best = {name: grid["best"] for name, grid in result["results"].items()}
  print(
    "--learning-rate "
    + ",".join(f"{k}={v['learning_rate']:g}" for k, v in best.items())
  )
  if radii := {k: v for k, v in best.items() if v["rho"] is not None}:
    print("--rho " + ",".join(f"{k}={v['rho']:g}" for k, v in radii.items()))
  for optimizer, grid in result["results"].items():
    for name in grid["on_edge"]:
      print(
        f"warning: the best {name} of {optimizers.label(optimizer)}, "
        f"{grid['best'][name]:g}, lies on the edge of its grid. Widen the grid "
        f"with --{name.replace('_', '-')}"
      )
  with files.saving(plan.output):
    files.write_json(result, path)
  print(f"wrote {path}")


COMMAND = flags.Command(
  name="tune",
  help="choose each optimizer's learning rate and radius on validation rows",
  settings=Tune,
  run=run,
)


def tune(plan: plan_lib.Plan) -> dict[str, Any]:
  """Trains every optimizer at every point of its grid.

  Args:
    plan: with grids of learning rates and radii.

  Returns:
    What the JSON holds: ``config``, and ``results`` with the mean validation
    accuracy after the last epoch at each point, its standard error, the best
    point and which of its coordinates lie on the edge of the grid.
  """
  splits = plan.draw_splits()
  trainer = plan.make_trainer()
  results = {}
  with progress.Bars() as bars:
    for optimizer in plan.optimizers:
      rates = plan.learning_rate[optimizer]
      radii = plan.rho.get(optimizer, ())
      on_epoch = bars.start(
        optimizers.label(optimizer), plan.epochs * len(rates)
      )
      # One learning rate at a time: all radii and seeds run together, and all
      # learning rates share one compiled program.
      columns = len(radii) or 1
      repeated = jax.tree.map(
        lambda x, n=columns: np.tile(x, (n,) + (1,) * (x.ndim - 1)), splits
      )
      rows, diverged = [], []
      for rate in rates:
        outcome = trainer(
          optimizer,
          repeated,
          np.full(columns * len(plan.seeds), rate),
          np.repeat(radii or (0.0,), len(plan.seeds)),
          with_curve=False,
          on_epoch=on_epoch,
        )
        by_radius = lambda x, n=columns: x.reshape(n, -1)
        rows.append(by_radius(outcome.validation_accuracy))
        diverged.append(by_radius(outcome.diverged).sum(axis=1))
      accuracy = np.array(rows)  # [learning rates, radii, seeds]
      results[optimizer] = _summary(rates, radii, accuracy, np.array(diverged))
  return {"config": plan.config(), "results": results}


def _summary(rates, radii, accuracy, diverged) -> dict[str, Any]:
  mean = accuracy.mean(axis=2)
  i, j = np.unravel_index(np.argmax(mean), mean.shape)
  on_edge = [
    name
    for name, k, axis in (("learning_rate", i, rates), ("rho", j, radii))
    if len(axis) > 1 and k in (0, len(axis) - 1)
  ]
  return {
    "learning_rate": list(rates),
    "rho": list(radii) or None,
    "validation_accuracy": mean.tolist(),
    "validation_accuracy_standard_error": [
      [statistics.standard_error(seeds) for seeds in row] for row in accuracy
    ],
    "diverged": diverged.tolist(),
    "best": {
      "learning_rate": rates[i],
      "rho": radii[j] if radii else None,
      "validation_accuracy": float(mean[i, j]),
    },
    "on_edge": on_edge,
  }


def _table(optimizer: str, grid: dict[str, Any]) -> str:
  radii = grid["rho"] or ["-"]
  return tables.table(
    [optimizers.label(optimizer), *(f"{radius}" for radius in radii)],
    [
      [f"{rate:g}", *map(tables.with_error, means, errors)]
      for rate, means, errors in zip(
        grid["learning_rate"],
        grid["validation_accuracy"],
        grid["validation_accuracy_standard_error"],
        strict=True,
      )
    ],
  )

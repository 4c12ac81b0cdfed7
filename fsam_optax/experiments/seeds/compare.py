"""``compare``: SGD, SAM and F-SAM on the same data, over many seeds."""

import dataclasses
from typing import Annotated, Any, Optional

import numpy as np

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.common import values
from fsam_optax.experiments.seeds import plan as plan_lib
from fsam_optax.experiments.seeds import recipes
from fsam_optax.experiments.seeds import report
from fsam_optax.experiments.seeds import shared_flags
from fsam_optax.experiments.seeds import trainer


@dataclasses.dataclass(frozen=True)
class Compare:
  """The flags of ``compare``.

  Attributes:
    data: what is trained on what.
    training: how every run is trained.
    rho: radius of the perturbation, in units of the weights: one value for sam
      and fsam, or one for each, as in sam=0.35,fsam=0.5.
    learning_rate: learning rate at the first step, a cosine takes it to 0: one
      value for all, or one for each, as in sgd=0.004,fsam=0.015.
    weight_decay: fraction of the weights that is added to the gradient: one
      value for all, or one for each.
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
    values.PerOptimizer,
    shared_flags.rho(is_grid=False),
    values.default(recipes.describe("rho")),
  ] = dataclasses.field(default_factory=dict)
  learning_rate: Annotated[
    values.PerOptimizer,
    shared_flags.learning_rate(is_grid=False),
    values.default(recipes.describe("learning_rate")),
  ] = dataclasses.field(default_factory=dict)
  weight_decay: Annotated[
    values.PerOptimizer,
    shared_flags.weight_decay(is_grid=False),
    values.default(recipes.describe("weight_decay")),
  ] = dataclasses.field(default_factory=dict)
  seeds: Annotated[
    Optional[int],
    shared_flags.SEEDS,
    values.default("64 for the mlp on mnist or digits, 16 otherwise"),
  ] = None
  first_seed: Annotated[int, shared_flags.FIRST_SEED] = recipes.FIRST_SEED


def run(given: Compare) -> None:
  """Runs the command.

  Args:
    given: its flags.

  Raises:
    FlagError: if they do not fit each other or the data.
  """
  extras.require("scipy.stats", "matplotlib.figure", "rich.progress")
  plan = plan_lib.make(given, is_grid=False)
  result = compare(plan)
  json_path = plan.output / "compare.json"
  figure_path = plan.output / "compare.png"
  pool = plan.pool
  print(
    f"{pool.name}, {plan.data.model}, label noise {plan.data.label_noise:g}, "
    f"{len(plan.seeds)} seeds from {plan.seeds[0]}, "
    f"{plan.epochs} epochs; {pool.train_size} training, "
    f"{pool.validation_size} validation and {pool.test_size} test rows"
  )
  if not (given.learning_rate and given.rho and given.weight_decay):
    print(f"default hyperparameters: {plan.origin}")
  print(f"\n{report.tables_of(result)}\n", flush=True)
  with files.saving(plan.output):
    files.write_json(result, json_path)
    report.draw(result, figure_path)
  print(f"wrote {json_path} and {figure_path}")


COMMAND = flags.Command(
  name="compare",
  help="train SGD, SAM and F-SAM on noisy labels and compare their accuracy",
  settings=Compare,
  run=run,
)


def compare(plan: plan_lib.Plan) -> dict[str, Any]:
  """Trains every optimizer on every seed.

  Args:
    plan: with one point for each optimizer.

  Returns:
    What the JSON holds: ``config``, ``results`` and ``paired``.
  """
  splits = plan.draw_splits()
  number = len(plan.seeds)
  train = plan.make_trainer()
  results, outcomes = {}, {}
  with progress.Bars() as bars:
    for optimizer in plan.optimizers:
      (point,) = plan.grids[optimizer].points()
      outcome = train(
        optimizer,
        splits,
        *(np.full(number, value) for value in point),
        on_epoch=bars.start(optimizers.label(optimizer), plan.epochs),
      )
      outcomes[optimizer] = outcome
      values_of = point._asdict()
      if optimizer not in optimizers.ASCENDING:
        values_of["rho"] = None
      results[optimizer] = values_of | _summary(plan.seeds, outcome)
  return {
    "config": plan.config(),
    "results": results,
    "paired": {
      f"{first}-{second}": _paired(outcomes[first], outcomes[second])
      for first, second in report.PAIRS
      if first in outcomes and second in outcomes
    },
  }


def _paired(first: trainer.Outcome, second: trainer.Outcome) -> dict[str, Any]:
  difference = first.curve - second.curve
  return {
    **statistics.paired(first.test_accuracy, second.test_accuracy),
    "curve": difference.mean(axis=1).tolist(),
    "curve_standard_error": [statistics.standard_error(x) for x in difference],
  }


def _summary(seeds: range, outcome: trainer.Outcome) -> dict[str, Any]:
  return {
    "test_accuracy": outcome.test_accuracy.tolist(),
    "train_accuracy": outcome.train_accuracy.tolist(),
    "validation_accuracy": outcome.validation_accuracy.tolist(),
    "curve": outcome.curve.mean(axis=1).tolist(),
    "curve_standard_error": [
      statistics.standard_error(row) for row in outcome.curve
    ],
    "diverged_seeds": [
      seed
      for seed, diverged in zip(seeds, outcome.diverged, strict=True)
      if diverged
    ],
    "seconds": outcome.seconds,
    "compile_seconds": outcome.compile_seconds,
  }

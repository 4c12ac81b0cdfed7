"""``study``: the evidence for and against the paper, one question each."""

import argparse
import importlib.metadata
import math
import pathlib
import time
from typing import Any

import fsam_optax
from fsam_optax.experiments import extras
from fsam_optax.experiments import recipes
from fsam_optax.experiments import report
from fsam_optax.experiments import settings as settings_lib
from fsam_optax.experiments import training

NAME = "study"
HELP = "answer one question about F-SAM by training many small models"
_FIRST_SEED = 2000
_SEARCH_SEEDS = 8


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of this command."""
  from fsam_optax.experiments import studies

  add = parser.add_argument
  add(
    "study",
    choices=studies.STUDIES,
    metavar="NAME",
    help="; ".join(
      f"{name}: {study.question}" for name, study in studies.STUDIES.items()
    ),
  )
  add(
    "--quick",
    action="store_true",
    help="a few epochs, seeds and values, to see it run: its figures say "
    "nothing",
  )
  settings_lib.add_data_flags(parser)
  add(
    "--seeds",
    type=settings_lib.integer(1, 10_000, remedy="64 tell F-SAM from SAM"),
    metavar="N",
    help="number of seeds to report; default "
    + ", ".join(f"{name} {s.seeds}" for name, s in studies.STUDIES.items()),
  )
  add(
    "--first-seed",
    type=settings_lib.integer(
      _SEARCH_SEEDS, 2**31, remedy="those below choose hyperparameters"
    ),
    default=_FIRST_SEED,
    metavar="SEED",
    help=f"the first of them; default {_FIRST_SEED}",
  )
  add(
    "--epochs",
    type=settings_lib.integer(1, 10**6, remedy="60 is usual"),
    metavar="N",
    help="passes over the training rows; default 60, on digits 100",
  )
  add(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("studies"),
    metavar="DIR",
    help="directory to write NAME.json and NAME.png to; default studies",
  )


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
  """Runs the command.

  Args:
    args: parsed flags.
    parser: to report a bad flag with.
  """
  extras.require("scipy.stats", "matplotlib.figure", "rich.progress", "matfree")
  from fsam_optax.experiments import studies

  study = studies.STUDIES[args.study]
  pool = settings_lib.load_data(args, parser)
  settings_lib.check_output(args, parser)
  recipe = recipes.recipe(args.dataset, args.model)
  number = 2 if args.quick else args.seeds or study.seeds
  start = time.perf_counter()
  with report.progress() as progress:
    context = studies.bench.Context(
      pool=pool,
      model=args.model,
      label_noise=args.label_noise,
      epochs=2 if args.quick else args.epochs or recipe.epochs,
      batch_size=min(recipe.batch_size, pool.train_size),
      search_seeds=range(1 if args.quick else _SEARCH_SEEDS),
      seeds=range(args.first_seed, args.first_seed + number),
      is_quick=args.quick,
      progress=progress,
    )
    found = study.run(context)
  result = _finite(
    {
      "study": args.study,
      "question": study.question,
      "config": config(context) | found.pop("config", {}),
      **found,
    }
  )
  json_path = args.output / f"{args.study}.json"
  figure_path = args.output / f"{args.study}.png"
  report.write_json(result, json_path)
  report.study_figure(result, figure_path)
  print(
    f"{args.study}: {study.question}\n{pool.name}, {args.model}, "
    f"{report.noise_of(result['config'])}{number} seeds from "
    f"{args.first_seed}, {context.epochs} epochs"
  )
  for table in result["tables"]:
    print(f"\n{report.table(table['header'], table['rows'])}")
  print(
    f"\nwrote {json_path} and {figure_path} in "
    f"{time.perf_counter() - start:.0f} s"
  )


def config(context: Any) -> dict[str, Any]:
  """What the JSON says about how its numbers came to be."""
  return {
    "dataset": context.pool.name,
    "model": context.model,
    "label_noise": context.label_noise,
    "train_size": context.pool.train_size,
    "validation_size": context.pool.validation_size,
    "test_size": context.pool.test_size,
    "momentum": training.MOMENTUM,
    "weight_decay": training.WEIGHT_DECAY,
    "learning_rate_schedule": "cosine to 0, convergence excepted",
    "epochs": context.epochs,
    "batch_size": context.batch_size,
    "search_seeds": list(context.search_seeds),
    "seeds": list(context.seeds),
    "quick": context.is_quick,
    "accuracy_unit": "percent",
    "versions": {
      "fsam_optax": fsam_optax.__version__,
      **{
        name: importlib.metadata.version(name)
        for name in ("jax", "optax", "flax", "numpy", "matfree")
      },
    },
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

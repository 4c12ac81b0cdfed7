"""``tune``: hyperparameters of each optimizer, chosen on validation rows."""

from typing import Any

from fsam_optax.experiments.common import extras
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common import progress
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import settings
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.store import Store


def run(given: settings.Settings) -> None:
  """Runs the command."""
  extras.require("rich.progress")
  output = given.training.output
  grids = settings.grids(given, is_grid=True)
  recipe = settings.recipe_of(given.data)
  lab = settings.laboratory(
    given, recipe.tuning_seeds, tuned_values.TUNING_FIRST_SEED
  ).at(store=Store(output / "tune.jsonl"))
  print(
    f"{lab.pool.name}, {lab.model}, label noise {lab.label_noise:g}: "
    f"validation accuracy %, {len(lab.seeds)} seeds from {lab.seeds[0]}\n",
    flush=True,
  )
  with progress.Bars() as bars:
    lab = lab.at(progress=bars.start)
    found = {name: lab.choose(name, grid) for name, grid in grids.items()}
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
    "config": lab.config() | {"optimizers": list(found)},
    "results": {name: _result(of) for name, of in found.items()},
  }
  path = output / "tune.json"
  with files.saving(output):
    files.write_json(result, path)
  print(f"wrote {path}")


COMMAND = flags.Command(
  name="tune",
  help="choose learning rate, radius and weight decay on validation rows",
  settings=settings.Settings,
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

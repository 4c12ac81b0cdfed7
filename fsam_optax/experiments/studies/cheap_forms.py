"""The study of cheap forms: which gradient may the ascent do without?

SGD, SAM, F-SAM and their cheaper forms. Every form gets the same search for its
radius: twelve values on the validation rows of 4 seeds, then the best three on
12 more. The accuracy is that of 48 other seeds, paired against full F-SAM. A
call trains at one setting of data set, network and label noise; the tables show
all that the rows hold.
"""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.lab.store import Row
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.lab.trainer import MOMENTUM
from fsam_optax.experiments.studies import ascents

_BATCH_SIZE = 96
_RADII = tuple(0.1 * 1.25**i for i in range(12))  # 0.1 to 1.2.
_RATES = tuple(0.001 * 1.5**i for i in range(12))  # Of SGD, 0.001 to 0.09.
# Of every form but SGD, which is tuned: the best of F-SAM's at 40 % noise.
_LEARNING_RATE = {
  ("mnist", "mlp"): 0.02,
  ("mnist", "cnn"): 0.01,
  ("digits", "mlp"): 0.03,
  ("digits", "cnn"): 0.02,
}
EIGHTH = "F-SAM, 1/8, descent average"
_SAM = fsam_optax.sam_perturbation
_DESCENT: dict[str, Any] = {"ema_gradient": "descent"}


def _arm(
  gradients: float, ascent: Any = arms.fsam, unit: float = 1, **more: Any
) -> arms.Arm:
  """A form of so many gradients, its radii in some unit."""
  radii = tuple(unit * radius for radius in _RADII)
  return arms.Arm(ascent, radii, (0.02,), gradients=gradients, **more)


def _rows(
  fraction: float, every: int = 1, ascent: Any = arms.fsam, **options: Any
):
  """A form that ascends by a fraction of the rows, at every k-th step."""
  if fraction < 1:
    options["ascent_fraction"] = fraction
  if every > 1:
    options["every"] = every
  unit = 1 if fraction in (1 / 2, 1 / 4) and every == 1 else 1.5
  return _arm(1 + fraction / every, ascent, unit, options=options)


def _late(ascent: Any, last: float) -> arms.Arm:
  return _arm(1 + last, ascent, last=last)


def _long(ascent: Any) -> arms.Arm:
  """A form that ascends where the gradient is longer than it used to be."""
  return _arm(
    2,
    lambda rho: ascents.gated(ascent(rho)),
    1.5,
    watch=lambda state: {
      "gradients": 1 + round(float(np.mean(state.memory[1] / state.count)), 3)
    },
  )


def _at_once(ascent: Any) -> arms.Arm:
  return _arm(
    2,
    lambda rho: ascents.parallel(ascent(rho)),
    1.5,
    make_step=ascents.parallel_step,
    sees_more=True,
  )


_SGD = arms.Arm(None, (0.0,), _RATES, gradients=1)
ARMS = {  # In the order of the tables.
  "SGD": _SGD,
  "SGD, twice the epochs": _SGD._replace(gradients=2, epochs=2),
  "random direction": _arm(
    1,
    lambda rho: ascents.along(ascents.random_direction(), rho),
    20,
  ),
  "F-SAM, previous descent gradient": _arm(
    1,
    lambda rho: optax.chain(ascents.previous_gradient(), arms.fsam(rho)),
    options=_DESCENT,
  ),
  "along the momentum": _arm(
    1,
    lambda rho: ascents.along(
      optax.chain(optax.trace(MOMENTUM), ascents.previous_gradient()), rho
    ),
    options=_DESCENT,
  ),
  "F-SAM, 1/16": _rows(1 / 16),
  "F-SAM, 1/8, every 2nd step": _rows(1 / 8, 2),
  "SAM, last 10 %": _late(_SAM, 0.1),
  "F-SAM, last 10 %": _late(arms.fsam, 0.1),
  "SAM, 1/8": _rows(1 / 8, ascent=_SAM),
  "F-SAM, 1/8": _rows(1 / 8),
  EIGHTH: _rows(1 / 8, **_DESCENT),
  "SAM, last 20 %": _late(_SAM, 0.2),
  "F-SAM, last 20 %": _late(arms.fsam, 0.2),
  "F-SAM, 1/4": _rows(1 / 4),
  "SAM, last 30 %": _late(_SAM, 0.3),
  "F-SAM, last 30 %": _late(arms.fsam, 0.3),
  "SAM, at long gradients": _long(_SAM),
  "F-SAM, at long gradients": _long(arms.fsam),
  "F-SAM, 1/2": _rows(1 / 2),
  "F-SAM, every 2nd step": _rows(1, 2),
  "F-SAM, perturbation held for 2 steps": _arm(
    1.5, lambda rho: ascents.hold(arms.fsam(rho), 2)
  ),
  "SAM, two gradients at once": _at_once(_SAM),
  "F-SAM, two gradients at once": _at_once(arms.fsam),
  "SAM": _arm(2, _SAM),
  "F-SAM": _arm(2),
}
# Fractions at full F-SAM's radius times their fifth root, without a search.
_BY_RULE = {
  f"F-SAM, 1/{n}, descent average, rho by the rule": n for n in (2, 4, 8, 16)
}
RULES = {name: _rows(1 / n, **_DESCENT) for name, n in _BY_RULE.items()}
# As the tables have it, where that is not the name.
_SHOWN = {
  "random direction": "random direction (control)",
  "F-SAM, previous descent gradient": "F-SAM, direction of the step before",
  "along the momentum": "along minus the momentum (MSAM)",
  "F-SAM, 1/16": "F-SAM, `ascent_fraction=1/16`",
  "F-SAM, 1/8, every 2nd step": "F-SAM, 1/8 and `every=2`",
  "SAM, last 10 %": "SAM in the last 10 %",
  "F-SAM, last 10 %": "F-SAM in the last 10 %, `start`",
  EIGHTH: '**F-SAM, 1/8, `ema_gradient="descent"`**',
  "SAM, last 20 %": "SAM in the last 20 %",
  "F-SAM, last 20 %": "F-SAM in the last 20 %",
  "SAM, last 30 %": "SAM in the last 30 %",
  "F-SAM, last 30 %": "F-SAM in the last 30 %",
  "SAM, at long gradients": "SAM at long gradients (AE-SAM)",
  "F-SAM, at long gradients": "F-SAM at long gradients",
  "F-SAM, every 2nd step": "F-SAM, `every=2`",
  "SAM, two gradients at once": "SAM, two gradients at once (SAMPa)",
  **{name: f"1/{n}" for name, n in _BY_RULE.items()},
}


def _run(lab: Lab) -> dict[str, Any]:
  lab = lab.at(
    batch_size=min(_BATCH_SIZE, lab.pool.train_size),
    search_seeds=range(4),
    more_seeds=range(4, 16),
    arms={**ARMS, **RULES},
  )
  rate = _LEARNING_RATE.get((lab.pool.name, lab.model), 0.02)
  for name in lab.chosen:
    _test(lab, name, rate)
  if "F-SAM" in lab.chosen:
    full = _test(lab, "F-SAM", rate)
    for name, n in _BY_RULE.items():
      point = Point(rate, full["rho"] * (1 / n) ** (-1 / 5), arms.UNTUNED_DECAY)
      lab.run(name, point, lab.seeds, "test")
  return report(lab.store.rows)


def _test(lab: Lab, name: str, rate: float) -> Row:
  """A form searched and tested, a late one at SGD's learning rate, too."""
  arm, rates = ARMS[name], [rate]
  if arm.perturbation is None:
    return lab.test(name)
  if arm.last < 1:
    rates.append(_test(lab, "SGD", rate)["learning_rate"])
  grids = [arm.grid._replace(learning_rate=(rate,)) for rate in rates]
  return lab.test(name, grids=grids)


def report(rows: Sequence[Row]) -> dict[str, Any]:
  """What the JSON holds of rows."""
  settings: dict[tuple[str, str, float], dict[str, Row]] = {}
  times: dict[str, list[float]] = {}
  for row in rows:
    if row["phase"] == "test":
      setting = row["dataset"], row["model"], row["label_noise"]
      settings.setdefault(setting, {})[row["arm"]] = row
    elif row["phase"] == "time":
      times.setdefault(row["arm"], []).append(row["time_over_sgd"])
  order = list(dict.fromkeys(dataset for dataset, _, _ in settings))
  key = lambda setting: (order.index(setting[0]), setting[2])
  tables = []
  for model in dict.fromkeys(model for _, model, _ in settings):
    of = {x: settings[x] for x in sorted(settings, key=key) if x[1] == model}
    tables += [
      {"title": f"{model}"} | _forms(of, ARMS, times if model == "mlp" else {}),
      {"title": f"{model}, rho by the rule"} | _forms(of, RULES, {}),
    ]
  tables.append({"title": "exponents of the rule"} | _exponents(settings))
  for (dataset, model, noise), found in sorted(settings.items()):
    title = {"title": f"{dataset}, {model}, label noise {noise:g}"}
    tables.append(
      title | paired_report.arms_table(found, ("F-SAM", "SAM"), "form")
    )
  dataset, model, _ = (
    ", ".join(map(str, dict.fromkeys(x))) for x in zip(*settings, strict=True)
  )
  noises = sorted({noise for _, _, noise in settings})
  return {
    "config": {"dataset": dataset, "model": model, "label_noise": noises},
    "tables": [table for table in tables if table["rows"]],
    "panels": [
      _panel(tables[i - len(settings)]["title"], found)
      for i, (_, found) in enumerate(sorted(settings.items()))
    ],
  }


def _forms(settings, names, times) -> dict[str, Any]:
  """Accuracy of F-SAM, and of the forms minus its own, by setting."""
  rows = []
  for name in names:
    if not all({name, "F-SAM"} <= found.keys() for found in settings.values()):
      continue
    gradients = [found[name]["gradients"] for found in settings.values()]
    ends = dict.fromkeys(f"{f(gradients):.4g}" for f in (min, max))
    row: list[Any] = [_SHOWN.get(name, name), " to ".join(ends)]
    if times:
      row.append(", ".join(f"{x:.2f}" for x in times.get(name, ())))
    for found in settings.values():
      accuracy = [found[x]["test_accuracy"] for x in (name, "F-SAM")]
      cell = paired_report.over(*accuracy)
      cell.pop("p", None)
      row.append(paired_report.mean(accuracy[0]) if name == "F-SAM" else cell)
    rows.append(row)
  titles = [f"{x} {noise:.0%}".replace("%", " %") for x, _, noise in settings]
  header = ["form", "gradients", *(["time, mlp, cnn"] if times else [])]
  return {"header": [*header, *titles], "rows": rows}


def _panel(title: str, found: Mapping[str, Row]) -> dict[str, Any]:
  """Accuracy against gradients: the forms that no cheaper one beats by name."""
  mean = lambda name: float(
    np.nanmean(np.array(found[name]["test_accuracy"], float))
  )
  forms = [name for name in found if name in ARMS]
  best = frontier({x: (found[x]["gradients"], mean(x)) for x in forms})
  others = [name for name in forms if name not in best]
  line = lambda names: paired_report.line(
    "",
    [found[x]["gradients"] for x in names],
    [found[x]["test_accuracy"] for x in names],
  )
  series = [line(best) | {"names": best}]
  if others:
    gray = {"color": "0.7", "is_points": True}
    series.append(line(others) | gray)
  return paired_report.panel("gradients a step", series, title=title)


def _exponents(settings: Mapping[Any, Any]) -> dict[str, Any]:
  """What an exponent of the rule for the eighth's radius costs at most.

  On the validation rows of the search, at full F-SAM's radius times
  ``8 ** exponent``, between two radii of the search in proportion to the
  logarithm of the radius, below the best radius of the search.
  """

  def loss(found, exponent):
    points = sorted(found[EIGHTH]["grid"], key=lambda point: point[1])
    _, radii, _, accuracies = zip(*points, strict=True)
    at = np.log(found["F-SAM"]["rho"] * 8**exponent)
    return np.interp(at, np.log(radii), accuracies) - max(accuracies)

  of_noise: dict[float, list[Any]] = {}
  for (_, _, noise), found in settings.items():
    if {EIGHTH, "F-SAM"} <= found.keys():
      of_noise.setdefault(noise, []).append(found)
  noises = sorted(of_noise)
  rows = [
    [
      exponent,
      *(
        f"{min(loss(x, exponent) for x in of_noise[noise]):.2f}"
        for noise in noises
      ),
    ]
    for exponent in (0, 0.1, 0.2, 0.3, 0.4)
  ]
  titles = [f"{noise:.0%} wrong".replace("%", " %") for noise in noises]
  return {"header": ["exponent", *titles], "rows": rows if noises else []}


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
  """The names that none as cheap or cheaper beats, from the cheapest on."""
  found: list[str] = []
  for name in sorted(points, key=lambda x: (points[x][0], -points[x][1])):
    if not found or points[name][1] > points[found[-1]][1]:
      found.append(name)
  return found


STUDY = Study(
  "cheap-forms",
  "which gradient may the ascent do without?",
  _run,
  ARMS,
  seeds=48,
  first_seed=1000,
)

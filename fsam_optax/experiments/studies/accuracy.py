"""Studies of test accuracy: over radius, noise, sigma, lmbda, batch, metric."""

import functools
from typing import Any

import fsam_optax
from fsam_optax.experiments.studies import bench as bench_lib

_WIDE_RADII = (0.1, 0.2, 0.35, 0.6, 1.0)
_SWEEP = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.85, 1.0)


def rho(context: bench_lib.Context) -> dict[str, Any]:
  """Accuracy over the radius, at one learning rate for both."""
  arms = {"SAM": bench_lib.SAM, "F-SAM": bench_lib.FSAM}
  bench = bench_lib.Bench(context, arms)
  radii = _SWEEP[::4] if context.is_quick else _SWEEP
  points = [(0.02, radius) for radius in radii]
  lines, rows, accuracy = [], [], {}
  for name in arms:
    runs = bench.run(name, points, context.seeds)
    accuracy[name] = runs.test_accuracy.reshape(len(radii), -1)
    lines.append(bench_lib.series(name, radii, accuracy[name]))
  for i, radius in enumerate(radii):
    pair = [accuracy[name][i] for name in ("F-SAM", "SAM")]
    rows.append(
      [
        f"{radius:g}",
        *(bench_lib.accuracy(accuracy[name][i]) for name in arms),
        bench_lib.signed(bench_lib.difference(*pair)),
      ]
    )
  return {
    "results": {
      name: {"rho": list(radii), "test_accuracy": values.tolist()}
      for name, values in accuracy.items()
    },
    "tables": [
      {"header": ["rho", *arms, "F-SAM over SAM"], "rows": rows},
    ],
    "panels": [_panel("rho", lines)],
  }


def label_noise(context: bench_lib.Context) -> dict[str, Any]:
  """Accuracy over the share of wrong labels, each arm tuned at each share."""
  wide = dict(radii=_WIDE_RADII)
  arms = {
    "SGD": bench_lib.SGD._replace(
      rates=tuple(0.0005 * 1.4**i for i in range(15))
    ),
    "SAM": bench_lib.SAM._replace(**wide),
    "F-SAM": bench_lib.FSAM._replace(**wide),
  }
  bench = bench_lib.Bench(context, arms)
  shares = (0.0, 0.4) if context.is_quick else (0.0, 0.2, 0.4, 0.6, 0.8)
  results = {
    f"{share:g}": {
      name: bench.test(name, bench.search(name, share), share)[1]
      for name in arms
    }
    for share in shares
  }
  found = _by_setting("label noise", shares, results, arms, ("F-SAM", "SAM"))
  return {**found, "config": {"label_noise": list(shares)}}


def hyperparameters(context: bench_lib.Context) -> dict[str, Any]:
  """Accuracy over sigma and over lmbda, the radius tuned at each value."""
  sigmas = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
  lmbdas = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99)
  if context.is_quick:
    sigmas, lmbdas = (0.0, 1.0), (0.9,)
  name_of = lambda sigma, lmbda: f"sigma {sigma:g}, lmbda {lmbda:g}"
  pairs = [(sigma, bench_lib.LMBDA) for sigma in sigmas]
  pairs += [(1.0, lmbda) for lmbda in lmbdas if lmbda != bench_lib.LMBDA]
  arms = {
    name_of(sigma, lmbda): bench_lib.Arm(
      functools.partial(bench_lib.fsam, sigma=sigma, lmbda=lmbda),
      radii=(0.25, 0.35, 0.5, 0.7),
      rates=(0.02,),
    )
    for sigma, lmbda in pairs
  }
  bench = bench_lib.Bench(context, arms)
  results = {name: bench.test(name, bench.search(name))[1] for name in arms}
  reference = name_of(1.0, bench_lib.LMBDA)
  rows = [
    [
      name,
      f"{result['rho']:g}" + _star(result),
      bench_lib.accuracy(result["test_accuracy"]),
      ""
      if name == reference
      else bench_lib.signed(
        bench_lib.difference(
          result["test_accuracy"], results[reference]["test_accuracy"]
        )
      ),
    ]
    for name, result in results.items()
  ]
  accuracy = lambda name: results[name]["test_accuracy"]
  return {
    "results": results,
    "tables": [
      {
        "header": ["", "rho", "test accuracy %", f"over {reference}"],
        "rows": rows,
      }
    ],
    "panels": [
      _panel(
        "sigma, at lmbda 0.9",
        [
          bench_lib.series(
            "F-SAM",
            sigmas,
            [accuracy(name_of(s, bench_lib.LMBDA)) for s in sigmas],
          )
        ],
      ),
      _panel(
        "lmbda, at sigma 1",
        [
          bench_lib.series(
            "F-SAM", lmbdas, [accuracy(name_of(1.0, x)) for x in lmbdas]
          )
        ],
      ),
    ],
  }


def batch_size(context: bench_lib.Context) -> dict[str, Any]:
  """Accuracy over the rows of a batch, both arms tuned at each size."""
  arms = {
    "SAM": bench_lib.SAM,
    "F-SAM": bench_lib.FSAM,
  }
  sizes = (50, 250) if context.is_quick else (50, 100, 250, 500)
  rows = context.pool.train_size
  sizes = [size for size in sizes if size <= rows] or [rows]
  results = {}
  for size in sizes:
    # Larger batches take fewer steps, and larger ones: rates by the square
    # root of the rows.
    scale = (size / 100) ** 0.5
    scaled = {
      name: arm._replace(rates=tuple(r * scale for r in arm.rates))
      for name, arm in arms.items()
    }
    bench = bench_lib.Bench(context._replace(batch_size=size), scaled)
    results[f"{size}"] = {
      name: bench.test(name, bench.search(name))[1] for name in arms
    }
  found = _by_setting("rows a batch", sizes, results, arms, ("F-SAM", "SAM"))
  found["panels"][0]["is_log"] = True
  return {**found, "config": {"batch_size": list(sizes)}}


def metric(context: bench_lib.Context) -> dict[str, Any]:
  """F-SAM against SAM in the Euclidean metric and in ASAM's."""
  # As many points as the others' grids.
  adaptive = {"radii": (1.5, 3.0, 6.0), "rates": (0.004, 0.008, 0.016, 0.032)}
  arms = {
    "SAM": bench_lib.SAM,
    "F-SAM": bench_lib.FSAM,
    "ASAM": bench_lib.Arm(
      functools.partial(fsam_optax.sam_perturbation, adaptive=True), **adaptive
    ),
    "F-ASAM": bench_lib.Arm(
      functools.partial(
        fsam_optax.friendly_perturbation, lmbda=bench_lib.LMBDA, adaptive=True
      ),
      **adaptive,
    ),
  }
  bench = bench_lib.Bench(context, arms)
  results = {name: bench.test(name, bench.search(name))[1] for name in arms}
  pairs = {"F-SAM": "SAM", "ASAM": "SAM", "F-ASAM": "ASAM"}
  rows = [
    [
      name,
      f"{result['learning_rate']:g}",
      f"{result['rho']:g}" + _star(result),
      bench_lib.accuracy(result["test_accuracy"]),
      ""
      if name not in pairs
      else f"over {pairs[name]}: "
      + bench_lib.signed(
        bench_lib.difference(
          result["test_accuracy"], results[pairs[name]]["test_accuracy"]
        )
      ),
    ]
    for name, result in results.items()
  ]
  accuracy = [result["test_accuracy"] for result in results.values()]
  return {
    "results": results,
    "tables": [
      {
        "header": ["", "learning rate", "rho", "test accuracy %", "paired"],
        "rows": rows,
      }
    ],
    "panels": [
      _panel("", [bench_lib.series("", list(results), accuracy)]),
    ],
  }


def _by_setting(what, settings, results, arms, pair) -> dict[str, Any]:
  """A table and a panel of the arms over a setting, and a paired column."""
  rows = []
  for setting in settings:
    of = results[f"{setting:g}"]
    rows.append(
      [
        f"{setting:g}",
        *(
          bench_lib.accuracy(of[name]["test_accuracy"])
          + f" (rate {of[name]['learning_rate']:.3g}"
          + ("" if of[name]["rho"] is None else f", rho {of[name]['rho']:g}")
          + f"){_star(of[name])}"
          for name in arms
        ),
        bench_lib.signed(
          bench_lib.difference(*(of[name]["test_accuracy"] for name in pair))
        ),
      ]
    )
  lines = [
    bench_lib.series(
      name,
      settings,
      [results[f"{s:g}"][name]["test_accuracy"] for s in settings],
    )
    for name in arms
  ]
  return {
    "results": results,
    "tables": [
      {"header": [what, *arms, " over ".join(pair)], "rows": rows},
    ],
    "panels": [_panel(what, lines)],
  }


def _star(result: dict[str, Any]) -> str:
  """Marks a best point at the end of its grid."""
  return "*" if result["on_edge"] else ""


def _panel(xlabel: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
  return {"xlabel": xlabel, "ylabel": "test accuracy (%)", "series": lines}

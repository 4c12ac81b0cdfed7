"""The study of the batch: accuracy over its rows, both arms tuned at each."""

from typing import Any

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.study import Study

_ARMS = {"SAM": arms.SAM, "F-SAM": arms.FSAM}
_SIZES = (50, 100, 250, 500)


def _run(lab: Lab) -> dict[str, Any]:
  rows = lab.pool.train_size
  sizes = [size for size in _SIZES if size <= rows] or [rows]
  results = {}
  for size in sizes[::2] if lab.is_quick else sizes:
    # Larger batches take fewer steps, and larger ones: rates by the square
    # root of the rows.
    rates = tuple(rate * (size / 100) ** 0.5 for rate in arms.RATES)
    at_size = lab.at(batch_size=size)
    results[size] = {
      name: at_size.test(name, grids=[arm.grid._replace(learning_rate=rates)])
      for name, arm in _ARMS.items()
    }
  found = paired_report.by_setting("rows a batch", results)
  found["panels"][0]["is_log"] = True
  return {**found, "config": {"batch_size": list(results)}}


STUDY = Study("batch-size", "does the gain depend on the batch?", _run, _ARMS)

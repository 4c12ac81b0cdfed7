"""The study of the batch: accuracy over its rows, both arms tuned at each."""

from typing import Any

from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import entry
from fsam_optax.experiments.studies import report

_SIZES = (50, 100, 250, 500)


def run(context: arms_lib.Context) -> dict[str, Any]:
  """Trains SAM and F-SAM at every batch size.

  Args:
    context: what to train on.

  Returns:
    What the JSON holds.
  """
  arms = {"SAM": arms_lib.SAM, "F-SAM": arms_lib.FSAM}
  sizes = _SIZES[::2] if context.is_quick else _SIZES
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
    contest = contest_lib.Contest(context._replace(batch_size=size), scaled)
    results[f"{size}"] = {
      name: contest.test(name, contest.choose(name))[1] for name in arms
    }
  found = report.by_setting("rows a batch", sizes, results, arms)
  found["panels"][0]["is_log"] = True
  return {**found, "config": {"batch_size": list(sizes)}}


ENTRY = entry.Study("batch-size", "does the gain depend on the batch?", run)

"""The studies of ``python -m fsam_optax study``: one question each."""

from collections.abc import Callable
from typing import Any, NamedTuple

from fsam_optax.experiments.studies import accuracy
from fsam_optax.experiments.studies import bench
from fsam_optax.experiments.studies import dynamics
from fsam_optax.experiments.studies import measures


class Study(NamedTuple):
  """A study.

  Attributes:
    run: from what it works on to what the JSON holds: ``results``, ``tables``,
      the ``panels`` of the figure, and what its ``config`` says otherwise.
    question: one line.
    seeds: to report by default.
  """

  run: Callable[[bench.Context], dict[str, Any]]
  question: str
  seeds: int


STUDIES = {
  "decomposition": Study(
    measures.decomposition,
    "which part of the gradient is a good ascent direction?",
    64,
  ),
  "rho": Study(
    accuracy.rho, "does F-SAM work at radii where SAM collapses?", 64
  ),
  "label-noise": Study(
    accuracy.label_noise, "how does it do with wrong labels?", 64
  ),
  "ema": Study(dynamics.ema, "does the average track the full gradient?", 8),
  "hyperparameters": Study(
    accuracy.hyperparameters, "how much do sigma and lmbda matter?", 64
  ),
  "curvature": Study(
    measures.curvature, "how curved is the loss where it ends?", 64
  ),
  "convergence": Study(
    dynamics.convergence, "how fast does the gradient vanish?", 8
  ),
  "batch-size": Study(
    accuracy.batch_size, "does the gain depend on the batch?", 64
  ),
  "metric": Study(
    accuracy.metric, "does it help in the metric of ASAM, too?", 64
  ),
}

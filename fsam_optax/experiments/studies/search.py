"""The arms of a study trained: chosen on validation rows, tested on others."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple, Optional

import jax
import numpy as np

from fsam_optax.experiments import networks
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds import trainer
from fsam_optax.experiments.studies import arms as arms_lib

_RUNS_AT_ONCE = 32
_MOST_EXTENSIONS = 4


class Runs(NamedTuple):
  """What came of ``R`` runs.

  Attributes:
    test_accuracy: percent, shape ``[R]``, float64; NaN of a run that diverged.
    validation_accuracy: percent, shape ``[R]``, float64; also of a run that
      diverged what it classifies, so that a search stays clear of it.
    diverged: shape ``[R]``, bool.
    params: leaves of shape ``[R, ...]``.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  diverged: np.ndarray
  params: Any


class Best(NamedTuple):
  """The best point of an arm's grid, by mean validation accuracy.

  Attributes:
    rate: learning rate.
    rho: radius, 0 for SGD.
    grid: of each point its rate, radius and mean validation accuracy.
    on_edge: which of the two lie at an end of their values.
  """

  rate: float
  rho: float
  grid: list[list[float]]
  on_edge: list[str]


class Contest:
  """Trains the arms of a study; each is compiled once."""

  def __init__(
    self,
    context: arms_lib.Context,
    arms: Mapping[str, arms_lib.Arm],
    **trainer_options: Any,
  ):
    """Prepares to train.

    Args:
      context: what to train on.
      arms: by name.
      **trainer_options: of
        :class:`fsam_optax.experiments.seeds.trainer.Trainer`.
    """
    self.context = context
    self.arms = dict(arms)
    self._at_once = 2 if context.is_quick else _RUNS_AT_ONCE
    self.trainer = trainer.Trainer(
      networks.REGISTRY[context.model].create(context.pool.classes),
      context.pool,
      sigma=1.0,
      lmbda=arms_lib.LMBDA,
      epochs=context.epochs,
      batch_size=context.batch_size,
      optimize=not context.is_quick,
      perturbations={
        name: arm.perturbation
        for name, arm in arms.items()
        if arm.perturbation is not None
      },
      **trainer_options,
    )

  def splits(
    self, seeds: Sequence[int], noise: Optional[float] = None
  ) -> splits_lib.Splits:
    """The splits of some seeds.

    Args:
      seeds: of the splits.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      One split a seed.
    """
    context = self.context
    if noise is None:
      noise = context.label_noise
    return splits_lib.split(
      context.pool, list(seeds), noise, context.label_noise_kind
    )

  def run(
    self,
    name: str,
    points: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    noise: Optional[float] = None,
  ) -> Runs:
    """Trains an arm on every seed at every point of rate and radius.

    Args:
      name: of the arm.
      points: learning rate and radius.
      seeds: of the splits, initializations and batches.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      The runs, those of the first point first.
    """
    optimizer = "sgd" if self.arms[name].perturbation is None else name
    splits = self.splits(seeds, noise)
    number = len(points) * len(seeds)
    # As many at a time always, for one compiled program; the last ones repeat
    # the first.
    at = np.arange(-(-number // self._at_once) * self._at_once) % number
    parts = at.reshape(-1, self._at_once)
    advance = self.context.progress(name, len(parts) * self.context.epochs)
    found = []
    for part in parts:
      rates, radii = np.array([points[i // len(seeds)] for i in part]).T
      rows = part % len(seeds)
      chosen = jax.tree.map(lambda x, rows=rows: x[rows], splits)
      outcome = self.trainer(
        optimizer, chosen, rates, radii, with_curve=False, on_epoch=advance
      )
      found.append(
        Runs(
          np.where(outcome.diverged, np.nan, outcome.test_accuracy),
          outcome.validation_accuracy,
          outcome.diverged,
          jax.tree.map(np.asarray, outcome.params),
        )
      )
    return jax.tree.map(lambda *x: np.concatenate(x)[:number], *found)

  def search(self, name: str, noise: Optional[float] = None) -> Best:
    """Chooses learning rate and radius on validation rows.

    Every arm starts from as many points. Where the best lies at an end of its
    values, they are continued beyond it, at most a few times.

    Args:
      name: of the arm.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      The best point.
    """
    is_quick = self.context.is_quick
    rates, radii = list(self.arms[name].rates), list(self.arms[name].radii)
    if is_quick:
      rates, radii = rates[:1], radii[:2]
    means: dict[tuple[float, float], float] = {}
    rate, rho, on_edge = rates[0], radii[0], []
    for _ in range(1 if is_quick else _MOST_EXTENSIONS + 1):
      points = [
        point for point in itertools.product(rates, radii) if point not in means
      ]
      runs = self.run(name, points, self.context.search_seeds, noise)
      found = runs.validation_accuracy.reshape(len(points), -1).mean(axis=1)
      means |= zip(points, found.tolist(), strict=True)
      rate, rho = max(means, key=lambda point: means[point])
      on_edge = [
        what
        for what, value, values in (
          ("learning rate", rate, rates),
          ("rho", rho, radii),
        )
        if continue_beyond(values, value)
      ]
      if not on_edge:
        break
    grid = [[*point, mean] for point, mean in means.items()]
    return Best(rate, rho, grid, on_edge)

  def test(
    self, name: str, best: Best, noise: Optional[float] = None
  ) -> tuple[Runs, dict[str, Any]]:
    """Trains an arm at its best point on the seeds to report.

    Args:
      name: of the arm.
      best: what :meth:`search` found.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      The runs, and what the JSON says about them.
    """
    runs = self.run(name, [(best.rate, best.rho)], self.context.seeds, noise)
    summary = {
      "learning_rate": best.rate,
      "rho": best.rho if self.arms[name].perturbation else None,
      "grid": best.grid,
      "on_edge": best.on_edge,
      "test_accuracy": runs.test_accuracy.tolist(),
      "diverged": int(runs.diverged.sum()),
    }
    return runs, summary

  def loss_and_data(self, runs: Runs, run: int, seeds: Sequence[int]):
    """Loss, parameters and training rows of one run, for the measures.

    Args:
      runs: of one point.
      run: which.
      seeds: of the runs.

    Returns:
      ``loss_fn, params, data``, the same function for every run.
    """
    splits = self.splits([seeds[run]])
    params = jax.tree.map(lambda x: x[run], runs.params)
    return self.trainer.loss, params, self.trainer.training_data(splits, 0)


def continue_beyond(values: list[float], best: float) -> bool:
  """Adds the next value of a geometric sequence where the best is at its end.

  A search whose best lies at an end has not seen it fall off beyond.

  Args:
    values: in ascending order; one alone is no search.
    best: one of them.

  Returns:
    Whether it was at an end.
  """
  if len(values) < 2 or best not in (values[0], values[-1]):
    return False
  if best == values[0]:
    values.insert(0, values[0] ** 2 / values[1])
  else:
    values.append(values[-1] ** 2 / values[-2])
  return True

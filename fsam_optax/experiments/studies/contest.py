"""The arms of a study trained: chosen on validation rows, tested on others."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any, Optional

import jax

from fsam_optax.experiments import networks
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds import trainer
from fsam_optax.experiments.studies import arms as arms_lib


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
    self._at_once = 2 if context.is_quick else 4
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
    points: Sequence[search.Point],
    seeds: Sequence[int],
    noise: Optional[float] = None,
  ) -> search.Runs:
    """Trains an arm on every seed at every point.

    Args:
      name: of the arm.
      points: to train at.
      seeds: of the splits, initializations and batches.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      The runs, those of the first point first.
    """
    return search.train(
      self.trainer,
      "sgd" if self.arms[name].perturbation is None else name,
      self.splits(seeds, noise),
      points,
      at_once=self._at_once,
      start_bar=lambda total: self.context.progress(name, total),
    )

  def choose(self, name: str, noise: Optional[float] = None) -> search.Found:
    """Chooses an arm's hyperparameters on validation rows.

    Args:
      name: of the arm.
      noise: fraction of the labels that are replaced; None for the study's.

    Returns:
      What was found.
    """
    grid, extensions = self.arms[name].grid, search.MOST_EXTENSIONS
    if self.context.is_quick:
      grid = search.Grid(grid[0][:1], grid[1][:2], grid[2][:1])
      extensions = 0
    return search.search(
      lambda points: self.run(name, points, self.context.search_seeds, noise),
      grid,
      extensions,
    )

  def test(
    self,
    name: str,
    found: search.Found,
    noise: Optional[float] = None,
    *,
    with_candidates: bool = False,
  ) -> tuple[search.Runs, dict[str, Any]]:
    """Trains an arm at its best point on the seeds to report.

    Args:
      name: of the arm.
      found: what :meth:`choose` returned.
      noise: fraction of the labels that are replaced; None for the study's.
      with_candidates: whether to train it as well at the points that other
        seeds may have chosen, for an error that includes the search.

    Returns:
      The runs at the best point, and what the JSON says about them.
    """
    seeds, best = self.context.seeds, found.best
    chosen = [found.points.index(best)]
    if with_candidates:
      chosen = found.candidates()
    runs = self.run(name, [found.points[i] for i in chosen], seeds, noise)
    accuracy = runs.test_accuracy.reshape(len(chosen), -1)
    summary = {
      "learning_rate": best.learning_rate,
      "rho": best.rho if self.arms[name].perturbation else None,
      "weight_decay": best.weight_decay,
      "grid": [
        [*point, mean]
        for point, mean in zip(
          found.points, found.accuracy.mean(axis=1).tolist(), strict=True
        )
      ],
      "on_edge": found.on_edge,
      "test_accuracy": accuracy[0].tolist(),
      "diverged": int(runs.diverged[: len(seeds)].sum()),
    }
    if with_candidates:
      summary["candidates"] = [
        {
          **found.points[i]._asdict(),
          "validation_accuracy": found.accuracy[i].tolist(),
          "test_accuracy": tested.tolist(),
        }
        for i, tested in zip(chosen, accuracy, strict=True)
      ]
    return jax.tree.map(lambda x: x[: len(seeds)], runs), summary

  def loss_and_data(self, runs: search.Runs, run: int, seeds: Sequence[int]):
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

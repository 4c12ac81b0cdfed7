"""The search for an optimizer's hyperparameters, and the error it brings.

Every point of a grid is trained on the same seeds. Where the best lies at an
end of its values they go on, so that it has been seen to fall off beyond. The
seeds that choose decide between neighbors by chance: a bootstrap over them says
how much that moves what is reported.
"""

import collections
from collections.abc import Callable
from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds import trainer as trainer_lib

MOST_EXTENSIONS = 6
DRAWS = 2000
_MOST_CANDIDATES = 12
_RESAMPLING_SEED = 0


class Point(NamedTuple):
  """Hyperparameters of an optimizer.

  Attributes:
    learning_rate: at the first step.
    rho: radius; 0 of SGD.
    weight_decay: fraction of the weights that is added to the gradient.
  """

  learning_rate: float
  rho: float
  weight_decay: float


class Grid(NamedTuple):
  """Values to try in all combinations, each in ascending order.

  Attributes:
    learning_rate: at the first step.
    rho: radii; 0 alone for SGD.
    weight_decay: fractions of the weights.
  """

  learning_rate: tuple[float, ...]
  rho: tuple[float, ...]
  weight_decay: tuple[float, ...]

  def points(self) -> list[Point]:
    """All combinations."""
    return [Point(*values) for values in itertools.product(*self)]


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


class Found(NamedTuple):
  """What a search found.

  Attributes:
    points: those that were trained, ``P`` of them.
    accuracy: on the validation rows, percent, shape ``[P, S]`` for the ``S``
      seeds that choose.
    diverged: runs that diverged, shape ``[P]``.
    on_edge: which of the best point's values lie at an end of those tried,
      although these went on.
  """

  points: list[Point]
  accuracy: np.ndarray
  diverged: np.ndarray
  on_edge: list[str]

  @property
  def best(self) -> Point:
    """The point of the highest mean accuracy."""
    return self.points[int(np.argmax(self.accuracy.mean(axis=1)))]

  def candidates(self) -> list[int]:
    """Indices of points that other seeds may well have chosen, the best first.

    Those that a hundredth of the bootstrap's draws choose, or more.
    """
    drawn = choices(self.accuracy, resamples(self.accuracy.shape[1]))
    counts = collections.Counter(drawn.tolist())
    best = int(np.argmax(self.accuracy.mean(axis=1)))
    others = [
      point
      for point, count in counts.most_common(_MOST_CANDIDATES)
      if count >= len(drawn) / 100 and point != best
    ]
    return [best, *others]


def train(
  trainer: trainer_lib.Trainer,
  optimizer: str,
  splits: splits_lib.Splits,
  points: Sequence[Point],
  *,
  at_once: int = 4,
  start_bar: Callable[[int], Callable[[], None]],
) -> Runs:
  """Trains an optimizer on every seed at every point.

  Args:
    trainer: of the runs.
    optimizer: one of its names.
    splits: one a seed.
    points: to train at.
    at_once: number of runs that train together, always as many, for one
      compiled program. Few, whose arrays fit a processor's cache: 4 take .4 of
      the time of 32 a run for the small CNN, .8 for the perceptron.
    start_bar: opens a progress bar for a number of epochs.

  Returns:
    The runs, those of the first point first.
  """
  seeds = len(splits.seed)
  number = len(points) * seeds
  # The last ones repeat the first.
  at = np.arange(-(-number // at_once) * at_once) % number
  parts = at.reshape(-1, at_once)
  advance = start_bar(len(parts) * trainer.epochs)
  found = []
  for part in parts:
    values = np.array([points[i // seeds] for i in part]).T
    rows = part % seeds
    outcome = trainer(
      optimizer,
      jax.tree.map(lambda x, rows=rows: x[rows], splits),
      *values,
      with_curve=False,
      on_epoch=advance,
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


def search(
  run: Callable[[list[Point]], Runs],
  grid: Grid,
  extensions: int = MOST_EXTENSIONS,
) -> Found:
  """Chooses a point on validation rows.

  Args:
    run: trains at some points on the seeds that choose.
    grid: to begin with.
    extensions: how many times it may go on beyond its ends.

  Returns:
    What was found.
  """
  axes = [list(values) for values in grid]
  points: list[Point] = []
  accuracy, diverged = [], []
  for left in range(extensions, -1, -1):
    new = [x for x in Grid(*map(tuple, axes)).points() if x not in points]
    runs = run(new)
    accuracy += list(runs.validation_accuracy.reshape(len(new), -1))
    diverged += list(runs.diverged.reshape(len(new), -1).sum(axis=1))
    points += new
    found = Found(points, np.array(accuracy), np.array(diverged), [])
    on_edge = [
      name
      for name, values, value in zip(
        Grid._fields, axes, found.best, strict=True
      )
      if is_at_an_end(values, value)
    ]
    if not on_edge or not left:
      return found._replace(on_edge=on_edge)
    for name in on_edge:
      axis = Grid._fields.index(name)
      continue_beyond(axes[axis], found.best[axis])
  raise AssertionError("The last round returns.")


def is_at_an_end(values: Sequence[float], best: float) -> bool:
  """Whether a search has not seen the best fall off on both sides.

  Args:
    values: in ascending order; one alone is no search.
    best: one of them. Nothing is below 0.

  Returns:
    Whether it is the first or the last.
  """
  return len(values) > 1 and best != 0 and best in (values[0], values[-1])


def continue_beyond(values: list[float], best: float) -> None:
  """Adds the next value of a geometric sequence beyond the end that is best.

  Args:
    values: in ascending order, at least two.
    best: the first or the last.
  """
  if best == values[0]:
    values.insert(0, float(f"{values[0] ** 2 / values[1]:.2g}"))
  else:
    ratio = values[-1] / values[-2] if values[-2] else 2
    values.append(float(f"{values[-1] * ratio:.2g}"))


def resamples(number: int) -> np.ndarray:
  """Draws of ``number`` seeds with replacement, shape ``[DRAWS, number]``.

  Always the same ones, so that optimizers whose runs are paired by their seeds
  stay paired.
  """
  rng = np.random.default_rng(_RESAMPLING_SEED)
  return rng.integers(0, number, (DRAWS, number))


def choices(accuracy: np.ndarray, seeds: np.ndarray) -> np.ndarray:
  """The point that each draw of seeds would have chosen.

  Args:
    accuracy: on validation rows, shape ``[P, S]``.
    seeds: as of :func:`resamples`, shape ``[D, S]``.

  Returns:
    Indices of points, shape ``[D]``.
  """
  return np.argmax(accuracy[:, seeds].mean(axis=2), axis=0)


class Tested(NamedTuple):
  """The candidates of a search, on seeds that chose nothing.

  Attributes:
    validation_accuracy: by the seeds that choose, shape ``[C, S]``.
    test_accuracy: by the seeds to report, shape ``[C, T]``; NaN where a run
      diverged.
  """

  validation_accuracy: np.ndarray
  test_accuracy: np.ndarray


def error_with_search(first: Tested, second: Tested) -> float:
  """Standard error of a paired difference, the search's included.

  In each draw of a bootstrap the seeds that choose are drawn again, both
  optimizers take their best point by these, and the seeds to report are drawn
  again, too.

  Args:
    first: of one optimizer.
    second: of the other, over the same seeds in the same order.

  Returns:
    Standard deviation over the draws of the difference of the means.
  """
  choosing = resamples(first.validation_accuracy.shape[1])
  testing = resamples(first.test_accuracy.shape[1])
  means = []
  for tested in (first, second):
    chosen = choices(tested.validation_accuracy, choosing)
    means.append(tested.test_accuracy[chosen[:, None], testing])
  return float(np.nanmean(means[0] - means[1], axis=1).std(ddof=1))

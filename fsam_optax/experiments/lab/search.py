"""The search for an arm's hyperparameters.

Every point of a grid is trained on the same seeds. Where the best lies at an
end of its values they go on. More seeds may then decide between the best few.
"""

import collections
import itertools
from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from fsam_optax.experiments.lab import bootstrap

MOST_EXTENSIONS = 6
_BEST_FEW = 3
_MOST_CANDIDATES = 12


class Point(NamedTuple):
  """Hyperparameters of an arm; the radius of SGD is 0."""

  learning_rate: float
  rho: float
  weight_decay: float


class Grid(NamedTuple):
  """Values of a point to try in all combinations, each in ascending order."""

  learning_rate: tuple[float, ...]
  rho: tuple[float, ...]
  weight_decay: tuple[float, ...]

  def points(self) -> list[Point]:
    """All combinations."""
    return [Point(*values) for values in itertools.product(*self)]


def around(
  value: float, number: int, step: float = 2**0.5
) -> tuple[float, ...]:
  """Values in geometric sequence, of which one is in the middle."""
  below = (number - 1) // 2
  return tuple(
    float(f"{value * step ** (i - below):.2g}") for i in range(number)
  )


class Found(NamedTuple):
  """What a search found.

  Attributes:
    best: the point to report.
    points: those that were trained, ``P`` of them.
    accuracy: on the validation rows, percent, shape ``[P, S]`` for the ``S``
      seeds that every point was trained on.
    diverged: runs of the best point by those seeds that diverged.
    on_edge: which of the best point's values lie at an end of those tried,
      although these went on.
  """

  best: Point
  points: list[Point]
  accuracy: np.ndarray
  diverged: int
  on_edge: list[str]

  def candidates(self) -> list[int]:
    """The best point, then those that 1 % of the bootstrap's draws choose."""
    draws = bootstrap.resamples(self.accuracy.shape[1])
    drawn = bootstrap.choices(self.accuracy, draws)
    counts = collections.Counter(drawn.tolist())
    best = self.points.index(self.best)
    others = [
      point
      for point, count in counts.most_common(_MOST_CANDIDATES)
      if count >= len(drawn) / 100 and point != best
    ]
    return [best, *others]


def search(
  run: Callable[[Point, Sequence[int]], dict[str, Any]],
  grid: Grid,
  seeds: Sequence[int],
  more_seeds: Sequence[int] = (),
  extensions: int = MOST_EXTENSIONS,
) -> Found:
  """Chooses a point on validation rows.

  Args:
    run: trains at a point on some seeds; its ``"validation_accuracy"`` has one
      value a seed, and ``"diverged"`` counts the runs that diverged.
    grid: to begin with.
    seeds: that every point is trained on.
    more_seeds: that the best three points are trained on as well.
    extensions: how many times the values may go on beyond their ends.
  """
  axes = [list(values) for values in grid]
  rows: dict[Point, dict[str, Any]] = {}
  for left in range(extensions, -1, -1):
    for point in Grid(*map(tuple, axes)).points():
      if point not in rows:
        rows[point] = run(point, seeds)
    of_some = {x: row["validation_accuracy"] for x, row in rows.items()}
    best, on_edge = _best(of_some, axes)
    if more_seeds and not (on_edge and left):
      ranked = sorted(of_some, key=lambda point: -np.mean(of_some[point]))
      of_all = {
        x: [*of_some[x], *run(x, more_seeds)["validation_accuracy"]]
        for x in ranked[:_BEST_FEW]
      }
      best, on_edge = _best(of_all, axes)
    if not on_edge or not left:
      break
    for name in on_edge:
      axis = Grid._fields.index(name)
      continue_beyond(axes[axis], best[axis])
  accuracy = np.array(list(of_some.values()))
  return Found(best, list(rows), accuracy, rows[best]["diverged"], on_edge)


def _best(accuracy, axes) -> tuple[Point, list[str]]:
  best = max(accuracy, key=lambda point: np.mean(accuracy[point]))
  fields = zip(Grid._fields, axes, best, strict=True)
  return best, [name for name, *values in fields if is_at_an_end(*values)]


def is_at_an_end(values: Sequence[float], best: float) -> bool:
  """Whether a search has not seen the best fall off on both sides.

  One value alone is no search, and nothing is below 0.
  """
  return len(values) > 1 and best != 0 and best in (values[0], values[-1])


def continue_beyond(values: list[float], best: float) -> None:
  """Adds the next value of a geometric sequence beyond the end that is best."""
  if best == values[0]:
    values.insert(0, _rounded(values[0] ** 2 / values[1], best))
  else:
    ratio = values[-1] / values[-2] if values[-2] else 2
    values.append(_rounded(values[-1] * ratio, best))


def _rounded(value: float, end: float) -> float:
  """To two digits, or to as many as leave it beyond the end."""
  rounded = (float(f"{value:.{digits}g}") for digits in range(2, 18))
  return next(x for x in rounded if (x - end) * (value - end) > 0)

"""The search for hyperparameters, and the error that it brings."""

import math

import numpy as np
import pytest

from fsam_optax.experiments.lab import bootstrap
from fsam_optax.experiments.lab import search


def peak(best):
  """An accuracy that falls off from a point with the square of the distance."""
  return lambda point: (
    -sum(math.log2(x / y) ** 2 for x, y in zip(point, best, strict=True) if y)
  )


def rows_of(score):
  """A search's `run`, in which every seed sees the same accuracy."""
  return lambda point, seeds: {
    "validation_accuracy": [score(point)] * len(seeds),
    "diverged": 0,
  }


def test_search_goes_beyond_its_values_until_the_best_lies_inside():
  asked, run_at = [], rows_of(peak((0.06, 0.05, 0.02)))

  def run(point, seeds):
    asked.append(point)
    return run_at(point, seeds)

  grid = search.Grid((0.0075, 0.015, 0.03), (0.2, 0.4), (0.01, 0.02, 0.04))
  found = search.search(run, grid, [0, 1])
  np.testing.assert_allclose(found.best, (0.06, 0.05, 0.02))
  assert found.on_edge == []
  assert len(set(asked)) == len(asked) == len(found.points)
  assert found.accuracy.shape == (len(asked), 2)
  # All its neighbors were tried.
  assert {(0.03, 0.05, 0.02), (0.12, 0.05, 0.02)} < set(asked)
  assert {(0.06, 0.025, 0.02), (0.06, 0.1, 0.02)} < set(asked)
  found = search.search(run, grid, [0, 1], extensions=1)
  assert found.on_edge == ["learning_rate", "rho"]


def test_no_decay_is_no_end_and_one_value_is_no_search():
  grid = search.Grid((0.1,), (0.0,), (0.0, 0.1))
  found = search.search(rows_of(lambda point: -point.weight_decay), grid, [0])
  assert found.best == (0.1, 0.0, 0.0)
  assert found.on_edge == []
  assert len(found.points) == 2
  rising = rows_of(lambda point: point.weight_decay)
  found = search.search(rising, grid, [0], extensions=2)
  assert found.points == [(0.1, 0.0, x) for x in (0.0, 0.1, 0.2, 0.4)]
  assert found.on_edge == ["weight_decay"]
  # Values that two digits would make one go on, too.
  close = search.Grid((0.1,), (0.0,), (0.1, 0.101))
  found = search.search(rising, close, [0], extensions=1)
  assert found.best.weight_decay == pytest.approx(0.102)


def test_more_seeds_decide_between_the_best_and_the_search_goes_on_by_them():
  """One seed says 0.1, the mean with two others 0.025, below the smallest."""
  asked = {}

  def run(point, seeds):
    asked.setdefault(tuple(seeds), []).append(point.rho)
    of = lambda seed: -abs(math.log2(point.rho / (0.025 if seed else 0.1)))
    return {"validation_accuracy": [of(x) for x in seeds], "diverged": 0}

  grid = search.Grid((0.1,), (0.05, 0.1, 0.2), (0.0,))
  found = search.search(run, grid, [0], [1, 2])
  values = sorted(asked[0,])
  assert found.best.rho == 0.05
  assert found.on_edge == []
  assert min(values) < 0.05 < max(values)
  assert set(asked) == {(0,), (1, 2)}
  assert len(asked[0,]) == len(found.points)
  assert max(asked[1, 2].count(x) for x in values) <= 2


def test_candidates_are_what_other_seeds_would_have_chosen():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(3, 16))
  # The first two differ by chance alone, and nobody chooses the third.
  accuracy = 80 + noise + np.array([[0.0], [0.01], [-20.0]])
  best = int(np.argmax(accuracy.mean(axis=1)))
  found = search.Found(best, [0, 1, 2], accuracy, 0, [])
  assert found.candidates() == [best, 1 - best]


def candidates(validation, test):
  fields = ("validation_accuracy", "test_accuracy")
  both = zip(validation, test, strict=True)
  return [dict(zip(fields, x, strict=True)) for x in both]


def test_error_with_a_search_that_cannot_err_is_the_paired_error():
  rng = np.random.default_rng(1)
  first, second = rng.normal(size=(2, 64))
  sure = np.ones((1, 16))
  found = bootstrap.error_with_search(
    candidates(sure, first[None]), candidates(sure, second[None])
  )
  expected = np.std(first - second, ddof=1) / 8
  assert found == pytest.approx(expected, rel=0.05)


def test_error_grows_by_the_lottery_between_two_points():
  """A coin toss between two points a point apart adds half a point."""
  rng = np.random.default_rng(2)
  toss = rng.normal(size=16)
  toss -= toss.mean()  # Half of the draws choose the one, half the other.
  test = np.stack([np.full(64, 80.0), np.full(64, 81.0)])
  lottery = candidates(np.stack([toss, -toss]), test)
  sure = candidates(np.ones((1, 16)), np.full((1, 64), 79.0))
  assert bootstrap.error_with_search(lottery, sure) == pytest.approx(
    0.5, abs=0.02
  )
  # Where both take part in the same draws, a shared toss cancels.
  assert bootstrap.error_with_search(lottery, lottery) == 0

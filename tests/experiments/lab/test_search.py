"""The search for hyperparameters, and the error that it brings."""

import math

import jax
import numpy as np
import pytest

from fsam_optax.experiments import networks
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import splits
from fsam_optax.experiments.seeds import trainer


def runs_of(score, points, seeds=2):
  """Runs at some points, of which every seed sees the same accuracy."""
  accuracy = np.repeat([score(point) for point in points], seeds)
  return search.Runs(accuracy, accuracy, np.zeros(len(accuracy), bool), None)


def peak(best):
  """An accuracy that falls off from a point with the square of the distance."""

  def score(point):
    return -sum(
      math.log2(x / y) ** 2 for x, y in zip(point, best, strict=True) if y
    )

  return score


def test_search_goes_beyond_its_values_until_the_best_lies_inside():
  asked = []

  def run(points):
    asked.extend(points)
    return runs_of(peak((0.06, 0.05, 0.02)), points)

  grid = search.Grid((0.0075, 0.015, 0.03), (0.2, 0.4), (0.01, 0.02, 0.04))
  found = search.search(run, grid)
  np.testing.assert_allclose(found.best, (0.06, 0.05, 0.02))
  assert found.on_edge == []
  assert len(set(asked)) == len(asked) == len(found.points)
  assert len(found.accuracy) == len(found.points)
  # All its neighbors were tried.
  assert {(0.03, 0.05, 0.02), (0.12, 0.05, 0.02)} < set(asked)
  assert {(0.06, 0.025, 0.02), (0.06, 0.1, 0.02)} < set(asked)
  found = search.search(run, grid, extensions=1)
  assert found.on_edge == ["learning_rate", "rho"]


def test_no_decay_is_no_end_and_one_value_is_no_search():
  run = lambda points: runs_of(lambda point: -point.weight_decay, points)
  found = search.search(run, search.Grid((0.1,), (0.0,), (0.0, 0.1)))
  assert found.best == (0.1, 0.0, 0.0)
  assert found.on_edge == []
  assert len(found.points) == 2
  run = lambda points: runs_of(lambda point: point.weight_decay, points)
  found = search.search(run, search.Grid((0.1,), (0.0,), (0.0, 0.1)), 2)
  assert found.points == [(0.1, 0.0, x) for x in (0.0, 0.1, 0.2, 0.4)]
  assert found.on_edge == ["weight_decay"]


def test_candidates_are_what_other_seeds_would_have_chosen():
  rng = np.random.default_rng(0)
  noise = rng.normal(size=(3, 16))
  # The first two differ by chance alone, and nobody chooses the third.
  accuracy = 80 + noise + np.array([[0.0], [0.01], [-20.0]])
  found = search.Found([None] * 3, accuracy, np.zeros(3), [])
  best = int(np.argmax(accuracy.mean(axis=1)))
  assert found.candidates() == [best, 1 - best]


def test_error_with_a_search_that_cannot_err_is_the_paired_error():
  rng = np.random.default_rng(1)
  first, second = rng.normal(size=(2, 64))
  sure = np.ones((1, 16))
  found = search.error_with_search(
    search.Tested(sure, first[None]), search.Tested(sure, second[None])
  )
  expected = np.std(first - second, ddof=1) / 8
  assert found == pytest.approx(expected, rel=0.05)


def test_error_grows_by_the_lottery_between_two_points():
  """A coin toss between two points a point apart adds half a point."""
  rng = np.random.default_rng(2)
  toss = rng.normal(size=16)
  toss -= toss.mean()  # Half of the draws choose the one, half the other.
  test = np.stack([np.full(64, 80.0), np.full(64, 81.0)])
  lottery = search.Tested(np.stack([toss, -toss]), test)
  sure = search.Tested(np.ones((1, 16)), np.full((1, 64), 79.0))
  assert search.error_with_search(lottery, sure) == pytest.approx(0.5, abs=0.02)
  # Where both take part in the same draws, a shared toss cancels.
  assert search.error_with_search(lottery, lottery) == 0


@pytest.fixture(name="small", scope="module")
def fixture_small():
  pool = splits.load("digits")
  return pool, trainer.Trainer(
    networks.REGISTRY["mlp"].create(pool.classes),
    pool,
    sigma=1.0,
    lmbda=0.9,
    epochs=2,
    batch_size=100,
    optimize=False,
  )


def trained(small, points, seeds):
  pool, train = small
  return search.train(
    train,
    "fsam",
    splits.split(pool, seeds, 0.2),
    points,
    at_once=2,
    start_bar=lambda total: lambda: None,
  )


def test_runs_come_back_in_order_whatever_runs_at_once(small):
  # Two at a time, and three: the last is alone with a copy.
  points = [search.Point(0.01, 0.1, 0.0), search.Point(0.02, 0.4, 0.1)]
  runs = trained(small, points, [10, 11, 12])
  assert runs.test_accuracy.shape == (6,)
  again = trained(small, points[1:], [12, 10])
  np.testing.assert_array_equal(again.test_accuracy, runs.test_accuracy[[5, 3]])
  leaf = jax.tree.leaves(runs.params)[0]
  assert leaf.shape[0] == 6
  assert not np.array_equal(leaf[3], leaf[4])


def test_weight_decay_is_that_of_the_run(small):
  """With next to no gradient the weights follow the decay's own recurrence."""
  points = [search.Point(0.01, 0.1, decay) for decay in (0.0, 3.0)]
  runs = trained(small, points, [10])
  free, decayed = jax.tree.leaves(runs.params)[1]
  scale, trace, steps = 1.0, 0.0, 16
  for t in range(steps):
    trace = 0.9 * trace + 3.0 * scale
    scale -= 0.01 * (1 + math.cos(math.pi * t / steps)) / 2 * trace
  found = np.vdot(decayed, free) / np.vdot(free, free)
  assert found == pytest.approx(scale, abs=0.1)
  assert abs(scale - 1) > 0.5

"""Differences over the same seeds."""

import math

import numpy as np

from fsam_optax.experiments.common import statistics


def test_paired_difference_is_that_of_the_pairs():
  pair = statistics.paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
  assert pair["mean"] == 2.0
  np.testing.assert_allclose(pair["standard_error"], 1 / math.sqrt(3))
  pair = statistics.paired([3.0, 5.0, 1.0, 9.0], [1.0, 2.0, 3.0, 4.0])
  assert pair["median"] == 2.5  # Of 2, 3, -2 and 5.


def test_a_run_far_below_the_median_has_collapsed():
  assert statistics.collapsed([80.0, 81.0, 82.0, 70.9]) == 0
  assert statistics.collapsed([80.0, 81.0, 82.0, 70.4, 10.0, math.nan]) == 1
  assert statistics.collapsed([math.nan]) == 0


def test_a_seed_that_diverged_leaves_its_pair_out():
  pair = statistics.paired([3.0, math.nan, 4.0], [1.0, 2.0, 3.0])
  assert pair["mean"] == 1.5
  nothing = statistics.paired([math.nan], [1.0])
  assert set(nothing.values()) == {None}


def test_one_value_has_no_standard_error():
  assert statistics.standard_error([3.0]) is None
  assert statistics.mean_and_error([3.0, math.nan]) == (3.0, None)
  assert statistics.mean_and_error([math.nan]) == (None, None)

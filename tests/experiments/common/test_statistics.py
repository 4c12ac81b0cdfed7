"""Differences over the same seeds."""

import math

import numpy as np

from fsam_optax.experiments.common import statistics


def test_equal_values_have_no_p_value():
  same = np.array([80.0, 81.0, 82.0])
  pair = statistics.paired(same, same)
  assert pair == {"mean": 0.0, "standard_error": 0.0, "p_value": None}


def test_paired_difference_is_that_of_the_pairs():
  pair = statistics.paired([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])
  assert pair["mean"] == 2.0
  np.testing.assert_allclose(pair["standard_error"], 1 / math.sqrt(3))
  assert 0.05 < pair["p_value"] < 0.1


def test_a_seed_that_diverged_leaves_its_pair_out():
  pair = statistics.paired([3.0, math.nan, 4.0], [1.0, 2.0, 3.0])
  assert pair["mean"] == 1.5
  nothing = statistics.paired([math.nan], [1.0])
  assert nothing == {"mean": None, "standard_error": None, "p_value": None}


def test_one_value_has_no_standard_error():
  assert statistics.standard_error([3.0]) is None
  assert statistics.mean_and_error([3.0, math.nan]) == (3.0, None)
  assert statistics.mean_and_error([math.nan]) == (None, None)

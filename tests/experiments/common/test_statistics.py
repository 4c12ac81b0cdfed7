"""Of accuracies over seeds, what a mean alone would hide."""

import math

from fsam_optax.experiments.common import statistics


def test_a_run_far_below_the_median_has_collapsed():
  assert statistics.collapsed([80.0, 81.0, 82.0, 70.9]) == 0
  assert statistics.collapsed([80.0, 81.0, 82.0, 70.4, 10.0, math.nan]) == 1
  assert statistics.collapsed([math.nan]) == 0


def test_one_value_has_no_standard_error():
  assert statistics.mean_and_error([3.0, math.nan]) == (3.0, None)
  assert statistics.mean_and_error([math.nan]) == (None, None)

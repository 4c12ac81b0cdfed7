"""Wrong labels: one meaning in every command."""

import numpy as np
import pytest
from scipy import stats

from fsam_optax.experiments.data import label_noise

LABELS = np.random.default_rng(0).integers(0, 10, 20_000).astype(np.int32)


def corrupt(kind, fraction, **options):
  return label_noise.corrupt(
    LABELS, 10, fraction, kind, rng=np.random.default_rng(1), **options
  )


@pytest.mark.parametrize("fraction", [0.0, 0.123, 0.4, 1.0])
def test_symmetric_noise_moves_exactly_its_fraction(fraction):
  noisy = corrupt("symmetric", fraction)
  assert (noisy != LABELS).sum() == round(fraction * len(LABELS))
  shift = (noisy - LABELS) % 10
  if fraction:
    counts = np.bincount(shift[shift > 0], minlength=10)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3


def test_uniform_noise_leaves_one_in_ten_right():
  noisy = corrupt("uniform", 0.4)
  wrong = (noisy != LABELS).mean()
  assert abs(wrong - 0.36) < 4 * (0.36 * 0.1 / len(LABELS)) ** 0.5
  assert stats.chisquare(np.bincount(noisy)).pvalue > 1e-3


def test_asymmetric_noise_moves_to_its_targets():
  noisy = corrupt("asymmetric", 0.4)
  moved = noisy != LABELS
  assert moved.sum() == 0.4 * len(LABELS)
  np.testing.assert_array_equal(noisy[moved], (LABELS[moved] + 1) % 10)
  targets = np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1], np.int32)
  noisy = corrupt("asymmetric", 1.0, targets=targets)
  np.testing.assert_array_equal(noisy, targets[LABELS])

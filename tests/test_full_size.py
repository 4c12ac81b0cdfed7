"""One epoch of the scaled-down recipe on files of CIFAR's real size."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fsam_optax.experiments import cifar

pytestmark = pytest.mark.slow


def write_colours(folder):
  """CIFAR-100 in which each class has a mean colour, under much noise."""
  expected = cifar.FORMATS["cifar100"]
  colours = np.random.default_rng(0).integers(0, 96, (100, 3), np.uint8)
  folder.mkdir()
  for i, (file, n) in enumerate({**expected.train, **expected.test}.items()):
    rng = np.random.default_rng(i + 1)
    labels = rng.integers(0, 100, n)
    images = rng.integers(0, 160, (n, 3, 1024), np.uint8)
    images += colours[labels][:, :, None]
    table = np.concatenate(
      [
        np.stack([labels // 5, labels], axis=1).astype(np.uint8),
        images.reshape(n, 3072),
      ],
      axis=1,
    )
    (folder / file).write_bytes(table.tobytes())


def test_an_epoch_learns_and_hardly_waits_for_data(tmp_path):
  write_colours(tmp_path / "cifar-100-binary")
  output = tmp_path / "run"
  done = subprocess.run(
    [
      *(sys.executable, "-m", "fsam_optax", "train"),
      *("--recipe=cifar100-resnet18", f"--data={tmp_path}", "--epochs=1"),
      *(f"--output={output}", "--depth=10", "--width=4"),
    ],
    capture_output=True,
    text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    timeout=500,
  )
  assert done.returncode == 0, done.stderr
  lines = [
    json.loads(line)
    for line in (output / "seed-1" / "metrics.jsonl").read_text().splitlines()
  ]
  epoch = lines[-1]
  assert epoch["batches"] == 391
  assert epoch["test_accuracy"] > 4  # Of a hundred classes.
  assert epoch["waiting_share"] < 0.25
  assert epoch["skipped"] == 0

"""Whole runs on files: of CIFAR's real size, and on a folder of images."""

import numpy as np
from PIL import Image
import pytest
import real_run

from fsam_optax.experiments.data import cifar

pytestmark = pytest.mark.slow


def write_colors(folder):
  """CIFAR-100 in which each class has a mean color, under much noise."""
  rng, expected = np.random.default_rng(0), cifar.FORMATS["cifar100"]
  colors = rng.integers(0, 96, (100, 3), np.uint8)
  folder.mkdir()
  for file, rows in {**expected.train, **expected.test}.items():
    table = rng.integers(0, 160, (rows, expected.record), np.uint8)
    labels = np.arange(rows) % 100
    table[:, 0], table[:, 1] = labels // 5, labels
    table[:, 2:] += colors[labels].repeat(1024, axis=1)
    (folder / file).write_bytes(table.tobytes())


def test_an_epoch_learns_and_hardly_waits_for_data(start, tmp_path):
  write_colors(tmp_path / "cifar-100-binary")
  flags = ("--epochs=1", "--model=cnn", "--depth=2", "--width=8")
  real_run.finish(start(tmp_path / "run", f"--data={tmp_path}", *flags))
  epoch = real_run.metrics(tmp_path / "run")[-1]
  assert epoch["batches"] == 390
  assert epoch["test_accuracy"] > 4  # Of a hundred classes.
  assert epoch["waiting_fraction"] < 0.25
  assert epoch["skipped"] == 0


def test_a_network_with_dropout_learns_from_a_folder_of_images(start, tmp_path):
  rng = np.random.default_rng(0)
  for part, rows in (("train", 32), ("test", 8)):
    for name, light in (("dark", 0), ("light", 128)):
      folder = tmp_path / "images" / part / name
      folder.mkdir(parents=True)
      for i in range(rows):
        pixels = rng.integers(light, light + 128, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
  flags = (
    *("--recipe=cifar100-vgg16bn", f"--data={tmp_path / 'images'}"),
    *("--image-size=32", "--depth=11", "--width=4", "--batch-size=16"),
    *("--epochs=8", "--label-noise=0.1", "--rho=0.05"),
  )
  real_run.finish(start(tmp_path / "run", *flags))
  epoch = real_run.metrics(tmp_path / "run")[-1]
  assert epoch["epoch"] == 8
  assert epoch["test_accuracy"] > 80

"""Whole runs on files: of CIFAR's real size, and on a folder of images."""

import json

import numpy as np
from PIL import Image
import pytest
import real_run

from fsam_optax.experiments.data import cifar

pytestmark = pytest.mark.slow


def write_colors(folder):
  """CIFAR-100 in which each class has a mean color, under much noise."""
  expected = cifar.FORMATS["cifar100"]
  colors = np.random.default_rng(0).integers(0, 96, (100, 3), np.uint8)
  folder.mkdir()
  for i, (file, n) in enumerate({**expected.train, **expected.test}.items()):
    rng = np.random.default_rng(i + 1)
    labels = rng.integers(0, 100, n)
    images = rng.integers(0, 160, (n, 3, 1024), np.uint8)
    images += colors[labels][:, :, None]
    table = np.concatenate(
      [
        np.stack([labels // 5, labels], axis=1).astype(np.uint8),
        images.reshape(n, 3072),
      ],
      axis=1,
    )
    (folder / file).write_bytes(table.tobytes())


@pytest.fixture(name="train")
def fixture_train(tmp_path_factory, tmp_path):
  """A run with these flags; its metrics, a dict a line."""

  def train(**flags):
    words = [f"--{k.replace('_', '-')}={x}" for k, x in flags.items()]
    with real_run.processes(real_run.environment(tmp_path_factory)) as start:
      real_run.finish(start(real_run.command(tmp_path / "run", *words)))
    text = (tmp_path / "run" / "seed-1" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]

  return train


def test_an_epoch_learns_and_hardly_waits_for_data(train, tmp_path):
  write_colors(tmp_path / "cifar-100-binary")
  lines = train(
    data=tmp_path, epochs=1, model="cnn", depth=2, width=8,
  )  # fmt: skip
  epoch = lines[-1]
  assert epoch["batches"] == 390
  assert epoch["test_accuracy"] > 4  # Of a hundred classes.
  assert epoch["waiting_fraction"] < 0.25
  assert epoch["skipped"] == 0


def test_a_network_with_dropout_learns_from_a_folder_of_images(train, tmp_path):
  rng = np.random.default_rng(0)
  for part, rows in (("train", 32), ("test", 8)):
    for name, light in (("dark", 0), ("light", 128)):
      folder = tmp_path / "images" / part / name
      folder.mkdir(parents=True)
      for i in range(rows):
        pixels = rng.integers(light, light + 128, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
  lines = train(
    recipe="cifar100-vgg16bn", data=tmp_path / "images", image_size=32,
    depth=11, width=4, batch_size=16, epochs=8, label_noise=0.1, rho=0.05,
  )  # fmt: skip
  assert lines[-1]["epoch"] == 8
  assert lines[-1]["test_accuracy"] > 80

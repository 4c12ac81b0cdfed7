"""The study on CIFAR: its rows, its search and its tables, on other images."""

import json

import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments import data
from fsam_optax.experiments.lab import splits
from fsam_optax.experiments.studies import cifar
from fsam_optax.experiments.studies import cifar100
from fsam_optax.experiments.studies import fine_tuning
from fsam_optax.experiments.studies import study_command


@pytest.fixture(name="small")
def fixture_small(monkeypatch):
  """Two classes that a glance tells apart, dark and bright, and few of them."""
  rng = np.random.default_rng(0)

  def draw(number):
    y = rng.integers(0, 2, number).astype(np.int32)
    x = rng.integers(0, 50, (number, 32, 32, 3)) + 150 * y[:, None, None, None]
    return x.astype(np.uint8), y

  images = data.Images(
    *("toy", *draw(700), *draw(200), 2),
    mean=(0.4, 0.4, 0.4),
    standard_deviation=(0.2, 0.2, 0.2),
  )
  for study in (cifar.STUDY, fine_tuning.STUDY, cifar100.STUDY):
    changed = study._replace(settings=study.settings[:1])
    monkeypatch.setitem(study_command.REGISTRY, study.name, changed)
  monkeypatch.setattr(cifar, "_VALIDATION", 200)
  all_rows = cifar.load
  few = lambda sources, name, train, *size: all_rows(sources, name, 384, *size)
  monkeypatch.setattr(cifar, "load", few)
  published = data.load
  load = lambda source, *, otherwise=None, **options: (
    images._replace(name=otherwise)
    if source == "toy"
    else published(source, **options)
  )
  monkeypatch.setattr(cifar.data, "load", load)
  return images


def test_rows_of_a_seed_are_those_of_the_published_rows(small):
  """Their stream and their order, so that a new form pairs with the old."""
  pool = cifar.load({"cifar10": "toy"}, "cifar10", 384)
  drawn = splits.split(pool, [3], 0.25)
  rng = np.random.default_rng((3, 19))
  order = rng.permutation(700)
  np.testing.assert_array_equal(drawn.train_rows[0], order[:384])
  np.testing.assert_array_equal(drawn.validation_rows[0], order[384:584])
  np.testing.assert_array_equal(drawn.test_rows[0], np.arange(700, 900))
  assert (drawn.train_labels[0] != small.y_train[order[:384]]).sum() == 96
  assert pool.x.dtype == np.uint8
  np.testing.assert_allclose(drawn.mean, [[102.0] * 3])
  np.testing.assert_allclose(drawn.standard_deviation, [[51.0] * 3])


def test_half_of_the_images_are_mirrored_by_seed_and_step():
  x = np.arange(64 * 2.0).reshape(64, 1, 2, 1)
  flips = []
  for seed, step in ((0, 0), (0, 1), (1, 0), (0, 0)):
    found = np.asarray(cifar.flip(np.uint32(seed), np.int32(step), x))
    flips.append((found != x).any(axis=(1, 2, 3)))
    np.testing.assert_array_equal(found[flips[-1]], x[flips[-1]][:, :, ::-1])
    assert 16 < flips[-1].sum() < 48
  assert (flips[0] == flips[3]).all()
  assert (flips[0] != flips[1]).any()
  assert (flips[0] != flips[2]).any()


def test_fine_tuning_begins_with_all_but_the_last_layer():
  hidden = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  weights = {"hidden": hidden, "last": np.ones((4, 100))}
  row = fine_tuning.weights_of((None, weights, None), None, classes=100)
  row = {path: [x] for path, x in row.items()}  # As the store has one run's.
  own = {
    "hidden": np.zeros((2, 3, 4), np.float32),
    "last": np.full((2, 4, 10), 7.0, np.float32),
  }
  variables = {"params": own, "batch_stats": 5}
  found = fine_tuning.begin_at(variables, json.loads(json.dumps(row)))
  for run in found["params"]["hidden"]:
    np.testing.assert_array_equal(run, hidden)
  np.testing.assert_array_equal(found["params"]["last"], own["last"])
  assert found["batch_stats"] == 5


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["cifar", "fine-tuning", "cifar100"])
def test_an_arm_is_tested_and_not_trained_twice(name, tmp_path, capsys):
  words = ["study", name, "--quick", "--cifar10", "toy", "--cifar100", "toy"]
  words += ["--arms", "F-SAM", "--output", str(tmp_path)]
  __main__.main(words)
  text = (tmp_path / f"{name}-quick.jsonl").read_text()
  rows = [json.loads(line) for line in text.splitlines()]
  (test,) = (row for row in rows if row["phase"] == "test")
  assert len(test["test_accuracy"]) == 2
  assert test["gradients"] == 2
  is_pretrained = "pretraining: " in capsys.readouterr().out
  assert is_pretrained == (name == "fine-tuning")
  __main__.main(words)
  assert (tmp_path / f"{name}-quick.jsonl").read_text() == text
  assert (
    study_command.REGISTRY[name].settings[0].title in capsys.readouterr().out
  )

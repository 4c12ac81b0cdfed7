"""A data set is one file and one line."""

import importlib
import json
import sys

import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments import data

TOY = '''
"""Two classes, told apart by their brightness."""

import numpy as np

from fsam_optax.experiments import data


def read(path, image_size):
  rng = np.random.default_rng(0)
  y = (np.arange(60) % 2).astype(np.int32)
  x = rng.normal(size=(60, 4, 4, 1)) + 3 * y[:, None, None, None]
  x = x.astype(np.float32)
  images = data.Images("toy", x[:40], y[:40], x[40:], y[40:], 2)
  return images.resized(image_size)


data.register(
  data.DataSet("toy", "two classes, 4 x 4", read)
)
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
  """The file, and the line that names it, undone after the test."""
  (tmp_path / "toy_data_set.py").write_text(TOY)
  monkeypatch.syspath_prepend(tmp_path)
  before = dict(data.REGISTRY)
  importlib.import_module("toy_data_set")
  yield
  data.REGISTRY.clear()
  data.REGISTRY.update(before)
  del sys.modules["toy_data_set"]


@pytest.mark.usefixtures("toy")
def test_a_toy_is_trained_on_by_its_name(tmp_path):
  words = "--data toy --seeds 1 --epochs 8 --label-noise 0 --optimizers sgd"
  __main__.main(["compare", *words.split(), "--output", str(tmp_path)])
  written = json.loads((tmp_path / "compare.json").read_text())
  assert written["config"]["train_size"] == 32
  assert written["config"]["test_size"] == 20
  assert written["results"]["sgd"]["test_accuracy"] == [100.0]


@pytest.mark.usefixtures("toy")
def test_a_toy_is_loaded_scaled_and_named_in_errors():
  assert data.load("toy", image_size=2).image_shape == (2, 2, 1)
  assert data.name_of("toy") == "toy"
  assert "toy: two classes, 4 x 4" in data.describe()
  with pytest.raises(data.DataError, match=r"npz:PATH, toy, the path"):
    data.load("tyo")


@pytest.mark.parametrize("source", ["cifar", "cifar10", "cifar10:", "mnist:x"])
def test_what_is_no_data_set_is_refused_with_those_there_are(source):
  with pytest.raises(data.DataError, match=r"must be one of .*mnist.*got"):
    data.load(source)


def test_a_path_that_nothing_recognizes_is_said_to_be_what_it_is(tmp_path):
  with pytest.raises(data.DataError, match=r"must be one of .*got .*nothing"):
    data.load(str(tmp_path / "nothing"), otherwise="cifar100")
  (tmp_path / "notes.txt").write_text("text")
  with pytest.raises(data.DataError, match=r"a folder with 'notes\.txt'$"):
    data.load(str(tmp_path))
  with pytest.raises(data.DataError, match=r"cifar-100-binary.tar.gz"):
    data.load(str(tmp_path), otherwise="cifar100")
  assert data.name_of("digits", otherwise="cifar100") == "digits"


def test_every_entry_stands_under_its_name():
  assert all(name == x.name for name, x in data.REGISTRY.items())
  assert isinstance(data.load("digits").x_train, np.ndarray)

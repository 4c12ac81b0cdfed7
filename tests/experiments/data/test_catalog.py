"""A data set is one file and one line."""

import numpy as np
import pytest

from fsam_optax.experiments import data


def test_a_toy_is_loaded_scaled_and_named_in_errors(monkeypatch):
  x = np.random.default_rng(0).normal(size=(60, 4, 4, 1)).astype(np.float32)
  y = (np.arange(60) % 2).astype(np.int32)
  images = data.Images("toy", x[:40], y[:40], x[40:], y[40:], 2)
  read = lambda path, image_size: images.resized(image_size)
  toy = data.DataSet("toy", "two classes, 4 x 4", read)
  monkeypatch.setitem(data.REGISTRY, "toy", toy)
  assert data.load("toy", image_size=2).x_train.shape == (40, 2, 2, 1)
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
  with pytest.raises(data.DataError, match=r"cifar-100-binary.tar.gz"):
    data.load(str(tmp_path), otherwise="cifar100")
  assert data.name_of("digits", otherwise="cifar100") == "digits"

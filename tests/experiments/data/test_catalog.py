"""A data set is one file and one line."""

import pytest

from fsam_optax.experiments import data


@pytest.mark.parametrize("source", ["cifar", "cifar10", "cifar10:", "mnist:x"])
def test_what_is_no_data_set_is_refused_with_those_there_are(source):
  with pytest.raises(data.DataError, match=r"must be one of .*mnist.*got"):
    data.load(source)


def test_a_path_that_nothing_recognizes_is_said_to_be_what_it_is(tmp_path):
  with pytest.raises(data.DataError, match=r"must be one of .*nothing', where"):
    data.load(str(tmp_path / "nothing"), otherwise="cifar100")
  with pytest.raises(data.DataError, match=r"No such file.* cifar-100-bin"):
    data.load("cifar.tar.gz", otherwise="cifar100")
  with pytest.raises(data.DataError, match="must be one of"):
    data.load("x" * 300)
  (tmp_path / "notes.txt").write_text("text")
  with pytest.raises(data.DataError, match=r"cifar-100-binary.tar.gz"):
    data.load(str(tmp_path), otherwise="cifar100")

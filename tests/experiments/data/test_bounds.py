"""What is looked at before a file is read."""

import pytest

from fsam_optax.experiments import data
from fsam_optax.experiments.common.terminal import printable
from fsam_optax.experiments.data import bounds


def test_the_size_of_a_file_is_known(tmp_path):
  path = tmp_path / "file"
  path.write_bytes(b"12345")
  assert bounds.size_of(str(path)) == 5
  (tmp_path / "link").symlink_to(path)
  assert bounds.size_of(str(tmp_path / "link")) == 5


def test_memory_is_compared_with_what_is_needed():
  left = bounds.available_memory()
  assert left is None or 2**24 < left < 2**50
  bounds.check_memory(2**10, "little", "None")
  with pytest.raises(
    data.DataError, match=r"must fit into memory, .* GiB, got much, .*Less"
  ):
    bounds.check_memory(2**70, "much", "Less")


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
  limit = tmp_path / "memory.max"
  monkeypatch.setattr(bounds, "_LIMITS", (str(limit), "/nothing"))
  limit.write_text("max\n")
  assert bounds.available_memory() != 12345
  limit.write_text("12345\n")
  assert bounds.available_memory() == 12345


def test_every_message_is_one_printable_line():
  error = data.DataError("must be\n\x1b[2J \u202e \udcff é 猫")
  assert str(error) == "must be\\n\\x1b[2J \\u202e \\udcff é 猫"
  assert printable("plain 'text'") == "plain 'text'"

"""The store of rows: what is in its file is not trained again."""

import pytest

from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.lab.store import Store


def test_rows_are_found_again_by_all_of_their_fields(tmp_path, capsys):
  path = tmp_path / "rows.jsonl"
  store = Store(path)
  store.append({"arm": "SAM", "seeds": [0, 1], "rho": 0.1, "found": [0.25]})
  assert store.find({"arm": "SAM", "rho": 0.1})["found"] == [0.25]
  assert not capsys.readouterr().err  # It is this run's own.
  again = Store(path)
  assert again.rows == store.rows
  assert again.find({"arm": "SAM", "rho": 0.1, "seeds": [0, 1]})
  assert "used again" in capsys.readouterr().err
  # A field that came later; its rows were trained without.
  assert again.find({"arm": "SAM", "rho": 0.1, "input_shape": [8, 8]})
  for key in ({"arm": "F-SAM"}, {"rho": 0.2}, {"seeds": [0]}):
    assert again.find({"arm": "SAM", **key}) is None


def test_a_broken_line_is_told(tmp_path):
  path = tmp_path / "rows.jsonl"
  path.write_text('{"arm": "SAM"}\n{"arm": "F')
  with pytest.raises(FlagError, match=r"must have rows of JSON in rows\.jsonl"):
    Store(path)

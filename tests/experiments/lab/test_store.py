"""The store of rows: what is in its file is not trained again."""

import json

import pytest

from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.lab.store import Store


def test_rows_are_found_again_by_all_of_their_fields(tmp_path, capsys):
  path = tmp_path / "rows.jsonl"
  store = Store(path)
  row = {"phase": "test", "arm": "SAM", "seeds": [0, 1], "rho": 0.1}
  store.append({**row, "found": [0.25]})
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
  path, row = tmp_path / "rows.jsonl", '{"phase": "a", "arm": "b", "seeds": []}'
  for line in (b'{"arm": "F', b"[1]", b'{"arm": "SAM"}', b"7", b"\xff"):
    path.write_bytes(row.encode() + b"\n" + line + b"\n")
    with pytest.raises(FlagError, match=r"rows of JSON in rows\.jsonl"):
      Store(path)
  with pytest.raises(FlagError, match=r"^argument --output: must be a dir"):
    Store(tmp_path)


def test_half_a_row_is_dropped_and_rows_of_another_process_are_read(
  tmp_path, capsys
):
  path = tmp_path / "rows.jsonl"
  rows = [{"phase": "test", "arm": arm, "seeds": [0]} for arm in "abc"]
  text = f"{json.dumps(rows[0])}\n{json.dumps(rows[1])[:20]}"
  path.write_text(text)
  store = Store(path)
  assert "half a row" in capsys.readouterr().err
  assert path.read_text() == text  # Until there is a row to add.
  Store(path).append(rows[1])
  store.append(rows[2])
  assert store.rows == [rows[0], rows[2]]
  assert store.read() == Store(path).rows == rows
  path.write_text(path.read_text().rstrip())  # By hand.
  Store(path).append(rows[0])
  assert store.read() == [*rows, rows[0]]

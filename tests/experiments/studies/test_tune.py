"""``tune``: what it chooses and warns of."""

import json

import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import trainer


def test_tune_chooses_on_validation_rows_and_warns_at_an_end(
  tmp_path, capsys, monkeypatch
):
  monkeypatch.setattr(search, "MOST_EXTENSIONS", 1)
  words = [
    *("tune", "--data", "digits", "--seeds", "2", "--epochs", "2"),
    *("--learning-rate", "fsam=0.001:0.004", "--rho", "fsam=0.05:0.1"),
    *("--weight-decay", "0:0.01", "--optimizers", "fsam"),
    *("--output", str(tmp_path)),
  ]
  __main__.main(words)
  written = json.loads((tmp_path / "tune.json").read_text())
  assert written["config"]["seeds"] == [0, 1]
  found = written["results"]["fsam"]
  assert "learning_rate" in found["on_edge"]
  rows = (tmp_path / "tune.jsonl").read_text()
  points = [json.loads(line) for line in rows.splitlines()]
  assert len({(x["learning_rate"], x["weight_decay"]) for x in points}) >= 6
  means = [np.mean(x["validation_accuracy"]) for x in points]
  best = points[int(np.argmax(means))]
  assert found["best"] == {name: best[name] for name in search.Point._fields}
  printed = capsys.readouterr().out
  assert "digits, mlp, label noise 0.4: validation accuracy %" in printed
  assert f"--weight-decay fsam={best['weight_decay']:g}\n" in printed
  assert "warning: the best learning_rate of F-SAM, " in printed
  # Again: nothing is trained, and with another sigma everything.
  monkeypatch.setattr(
    trainer.Trainer, "__call__", lambda *_, **__: pytest.fail("it trained")
  )
  __main__.main(words)
  assert json.loads((tmp_path / "tune.json").read_text()) == written
  assert (tmp_path / "tune.jsonl").read_text() == rows
  assert "are used again" in capsys.readouterr().err
  with pytest.raises(pytest.fail.Exception, match="it trained"):
    __main__.main([*words, "--sigma", "0.5"])

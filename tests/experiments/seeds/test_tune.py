"""``tune``: what it chooses and warns of."""

import json

import numpy as np

from fsam_optax import __main__


def run(*argv):
  __main__.main([str(argument) for argument in argv])


def test_tune_chooses_on_validation_rows_and_warns_at_an_edge(tmp_path, capsys):
  run(
    *("tune", "--dataset", "digits", "--seeds", 2, "--epochs", 2),
    *("--learning-rate", "sam=1e-6:0.05", "--rho", "sam=0.05:0.1:100"),
    *("--optimizers", "sam", "--output", tmp_path),
  )
  written = json.loads((tmp_path / "tune.json").read_text())
  grid = written["results"]["sam"]
  accuracy = np.array(grid["validation_accuracy"])
  assert accuracy.shape == (2, 3)
  best = np.unravel_index(accuracy.argmax(), accuracy.shape)
  assert grid["best"]["learning_rate"] == grid["learning_rate"][best[0]] == 0.05
  assert grid["best"]["rho"] == grid["rho"][best[1]]
  assert written["config"]["seeds"] == [0, 1]
  assert "warning: the best learning_rate of SAM, 0.05, lies on the edge" in (
    capsys.readouterr().out
  )

"""``compare``: its flags, and what it writes."""

import json
import re
import subprocess
import sys

import numpy as np
from printed import plain
import pytest

from fsam_optax import __main__ as command_line
from fsam_optax.experiments.lab import trainer


@pytest.fixture
def own(tmp_path):
  """A user's file: 40 and 10 rows of three classes."""
  x, y = np.random.default_rng(0).normal(size=(50, 6)), np.arange(50) % 3
  path = tmp_path / "own.npz"
  np.savez(path, x_train=x[:40], y_train=y[:40], x_test=x[40:], y_test=y[40:])
  return path


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
  """One run of the command in a process of its own; its output and files."""
  output = tmp_path_factory.mktemp("two") / "new" / "directory"
  process = subprocess.run(
    [
      *(sys.executable, "-m", "fsam_optax", "compare", "--data", "digits"),
      *("--seeds", "2", "--epochs", "2", "--output", str(output)),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  return process, output


def run(output, words):
  command_line.main(["compare", f"--output={output}", *words.split()])


def written(output):
  """The JSON, which is strict."""
  text = (output / "compare.json").read_text()
  return json.loads(text, parse_constant=pytest.fail)


# Flags.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    ("--label-noise 1", r"--label-noise: must be a number in \[0, 1\)"),
    ("--optimizers sgd adam", "invalid choice 'adam' for argument '--optim"),
    ("--rho=-1", r"--rho: must be a number in \[0, inf\), got '-1'; write"),
    ("--rho sam=1,sam=2", "--rho: must be one value or one for each of sam, f"),
    ("--rho 0.1:0.2", "--rho: must be one value for each optimizer"),
    ("--learning-rate 0", r"--learning-rate: must be a number in \(0, inf"),
    ("--weight-decay adam=1", "--weight-decay: must be one value or one for"),
    ("--seeds 0", r"--seeds: must be an integer in \[1, 10000\], got '0'; 64"),
    ("--batch-size 801", "--batch-size: must be at most the 800 training rows"),
    ("--data none.npz", "--data: .*No such file"),
    ("--data {own} --model cnn", "--model: cnn must have images"),
    ("--model resnet", "--model: must be one of cnn, mlp, got 'resnet'"),
    ("--image-size 3", "--data: .*--image-size 3 divides, got rows"),
    ("--label-noise-kind odd", "--label-noise-kind: must be one of symmetric"),
    ("--output {own}", "--output: must be a directory that .*Choose another"),
    ("--optimizers sgd --rho 1", r"--rho: must be of .* \[\], got one for all"),
    ("--optimizers fsam --rho sam=1", r"--rho: must be .*'fsam'\], got sam"),
    (
      "--optimizers sam --sigma 0.5",
      "--sigma: must be left out, for fsam",
    ),
    (
      "--label-noise 0 --label-noise-kind uniform",
      "-kind: must have --label-noise above 0",
    ),
  ],
)
def test_bad_flag_ends_with_status_2_before_any_training(
  tmp_path, own, monkeypatch, capsys, flags, message
):
  monkeypatch.setattr(
    trainer.Trainer, "__call__", lambda *args: pytest.fail("it trained")
  )
  with pytest.raises(SystemExit) as stop:
    run(tmp_path, f"--data digits {flags.format(own=own)}")
  assert stop.value.code == 2
  error = plain(capsys.readouterr().err)
  assert re.search(message, error), error


# What the command does.


def test_json_has_the_promised_schema(two_seeds):
  process, output = two_seeds
  found = written(output)
  assert list(found) == ["config", "results", "tables", "panels"]
  config = found["config"]
  assert config["accuracy_unit"] == "percent"
  assert config["seeds"] == [200, 201]
  assert "search_seeds" not in config
  assert config["test_size"] == 697
  assert set(config["versions"]) >= {"jax", "optax", "numpy", "fsam_optax"}
  assert list(found["results"]) == ["sgd", "sam", "fsam"]
  for result in found["results"].values():
    assert f"{result['weight_decay']:g}" in process.stdout
    assert result["seconds"] > 0
    assert result["diverged"] == 0
    for key in ("test_accuracy", "validation_accuracy"):
      assert len(result[key]) == 2
      assert all(0 <= value <= 100 for value in result[key])
    # The curve is of the validation rows: its end is their final accuracy.
    assert np.shape(result["curve"]) == (2, 2)
    assert [run[-1] for run in result["curve"]] == result["validation_accuracy"]
  accuracy, differences = (panel["series"] for panel in found["panels"])
  names = ["F-SAM over SAM", "SAM over SGD", "F-SAM over SGD"]
  assert [series["label"] for series in differences] == names
  _, sam, fsam = (series["mean"] for series in accuracy)
  assert differences[0]["mean"] == pytest.approx(np.subtract(fsam, sam))
  assert "F-SAM over SAM" in process.stdout
  assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
  assert len(list(output.iterdir())) == 2


def test_same_seeds_give_the_same_numbers(two_seeds, tmp_path, capsys):
  run(tmp_path, "--data digits --seeds 2 --epochs 2 --optimizers sam")
  again, first = written(tmp_path), written(two_seeds[1])
  for key in ("test_accuracy", "curve"):
    assert again["results"]["sam"][key] == first["results"]["sam"][key]
  assert len(again["panels"]) == 1
  assert "F-SAM" not in capsys.readouterr().out


def test_one_seed_and_a_diverged_one_are_reported_without_nan(
  tmp_path, own, capsys
):
  flags = "--seeds 1 --epochs 3 --learning-rate sgd=1e30 --optimizers sgd fsam"
  run(tmp_path, f"--data {own} {flags}")
  found = written(tmp_path)
  assert found["config"]["label_noise"] == 0  # Not said, of one's own data.
  results = found["results"]
  assert (results["sgd"]["diverged"], results["fsam"]["diverged"]) == (1, 0)
  assert found["panels"][0]["series"][1]["error"] == [None] * 3
  printed = capsys.readouterr().out
  assert "- (1 diverged)" in printed
  assert "n/a" in printed


def test_radius_zero_is_sgd_with_the_same_seeds(tmp_path, capsys):
  """Split, noise, initialization and batches are paired over optimizers."""
  flags = "--rho 0 --learning-rate 0.02 --weight-decay 0.01"
  flags += " --seeds 2 --epochs 1 --optimizers sgd fsam"
  run(tmp_path, f"--data digits {flags}")
  results = written(tmp_path)["results"]
  assert results["sgd"]["test_accuracy"] == results["fsam"]["test_accuracy"]
  assert "default hyperparameters" not in capsys.readouterr().out

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


def run(*argv):
  command_line.main([str(argument) for argument in argv])


# Flags.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      "--label-noise 1",
      r"--label-noise: must be a number in \[0, 1\)",
    ),
    ("--optimizers sgd adam", "invalid choice 'adam' for argument '--optim"),
    ("--rho=-1", r"--rho: must be a number in \[0, inf\), got '-1'; write"),
    ("--rho sgd=1", "--rho: must be one value or one for each of sam, fsam"),
    ("--rho sam=1,sam=2", "--rho: must be one value or one for each"),
    ("--rho 0.1:0.2", "--rho: must be one value for each optimizer"),
    ("--learning-rate 0", r"--learning-rate: must be a number in \(0, inf"),
    ("--weight-decay adam=1", "--weight-decay: must be one value or one for"),
    ("--seeds 0", "--seeds: must be an integer from 1"),
    ("--batch-size 801", "--batch-size: must be at most the 800 training rows"),
    (
      "--data cifar",
      "--data: must be one of cifar100:PATH, cifar10:PATH, digits",
    ),
    ("--data none.npz", "--data: .*No such file"),
    ("--model resnet", "--model: must be one of cnn, mlp, got 'resnet'"),
    ("--image-size 3", "--data: .*--image-size 3 divides, got rows"),
    ("--label-noise-kind odd", "--label-noise-kind: must be one of symmetric"),
    ("--output {file}", "--output: must be a directory that can be written to"),
  ],
)
def test_bad_flag_ends_with_status_2_before_any_training(
  tmp_path, monkeypatch, capsys, flags, message
):
  monkeypatch.setattr(
    trainer.Trainer, "__call__", lambda *args: pytest.fail("it trained")
  )
  file = tmp_path / "file"
  file.touch()
  flags = flags.format(file=file).split()
  with pytest.raises(SystemExit) as stop:
    run("compare", "--data", "digits", "--output", tmp_path, *flags)
  assert stop.value.code == 2
  error = plain(capsys.readouterr().err)
  assert re.search(message, error), error


# What the command does.


def test_json_has_the_promised_schema(two_seeds):
  process, output = two_seeds
  written = json.loads(
    (output / "compare.json").read_text(), parse_constant=pytest.fail
  )
  assert list(written) == ["config", "results", "tables", "panels"]
  config = written["config"]
  assert config["accuracy_unit"] == "percent"
  assert config["seeds"] == [200, 201]
  assert config["test_size"] == 697
  assert set(config["versions"]) >= {"jax", "optax", "numpy", "fsam_optax"}
  assert list(written["results"]) == ["sgd", "sam", "fsam"]
  for result in written["results"].values():
    assert f"{result['weight_decay']:g}" in process.stdout
    assert result["seconds"] > 0
    assert result["diverged"] == 0
    for key in ("test_accuracy", "validation_accuracy"):
      assert len(result[key]) == 2
      assert all(0 <= value <= 100 for value in result[key])
    # The curve is of the validation rows: its end is their final accuracy.
    assert np.shape(result["curve"]) == (2, 2)
    assert [run[-1] for run in result["curve"]] == result["validation_accuracy"]
  accuracy, differences = (panel["series"] for panel in written["panels"])
  names = ["F-SAM over SAM", "SAM over SGD", "F-SAM over SGD"]
  assert [series["label"] for series in differences] == names
  _, sam, fsam = (series["mean"] for series in accuracy)
  assert differences[0]["mean"] == pytest.approx(np.subtract(fsam, sam))
  assert "F-SAM over SAM" in process.stdout
  assert (output / "compare.png").read_bytes().startswith(b"\x89PNG")
  assert len(list(output.iterdir())) == 2


def test_same_seeds_give_the_same_numbers(two_seeds, tmp_path, capsys):
  run(
    *("compare", "--data", "digits", "--seeds", 2, "--epochs", 2),
    *("--output", tmp_path, "--optimizers", "sam"),
  )
  again = json.loads((tmp_path / "compare.json").read_text())
  first = json.loads((two_seeds[1] / "compare.json").read_text())
  for key in ("test_accuracy", "curve"):
    assert again["results"]["sam"][key] == first["results"]["sam"][key]
  assert len(again["panels"]) == 1
  assert "F-SAM" not in capsys.readouterr().out


def test_one_seed_and_a_diverged_one_are_reported_without_nan(
  tmp_path, own, capsys
):
  run(
    *("compare", "--data", own, "--seeds", 1, "--epochs", 3),
    *("--learning-rate", "sgd=1e30", "--output", tmp_path),
    *("--optimizers", "sgd", "fsam"),
  )
  written = json.loads(
    (tmp_path / "compare.json").read_text(), parse_constant=pytest.fail
  )
  assert written["config"]["label_noise"] == 0  # Not said, of one's own data.
  results = written["results"]
  assert (results["sgd"]["diverged"], results["fsam"]["diverged"]) == (1, 0)
  assert written["panels"][0]["series"][1]["error"] == [None] * 3
  printed = capsys.readouterr().out
  assert "- (1 diverged)" in printed
  assert "n/a" in printed


def test_radius_zero_is_sgd_with_the_same_seeds(tmp_path):
  """Split, noise, initialization and batches are paired over optimizers."""
  run(
    *("compare", "--data", "digits", "--seeds", 2, "--epochs", 1),
    *("--rho", 0, "--learning-rate", 0.02, "--weight-decay", 0.01),
    *("--output", tmp_path),
    *("--optimizers", "sgd", "fsam"),
  )
  results = json.loads((tmp_path / "compare.json").read_text())["results"]
  assert results["sgd"]["test_accuracy"] == results["fsam"]["test_accuracy"]


def test_convolutional_network_needs_images(tmp_path, own, capsys):
  with pytest.raises(SystemExit):
    run("compare", "--data", own, "--model", "cnn", "--output", tmp_path)
  assert "--model: cnn must have images" in capsys.readouterr().err

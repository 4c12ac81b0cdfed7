"""The studies: their directions, their search and what they write."""

import json
import math

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import __main__
from fsam_optax.experiments import data
from fsam_optax.experiments import directions
from fsam_optax.experiments import report
from fsam_optax.experiments import studies
from fsam_optax.experiments.studies import bench as bench_lib
from fsam_optax.experiments.studies import measures

NAMES = sorted(studies.STUDIES)
SEVERAL = ("rho", "ema")  # Of which the everyday run sees that they run.


def loss_fn(params, model_state, batch, rng):
  del rng
  error = batch["x"] @ params["w"] - batch["y"]
  return jnp.mean(error**2), (model_state, {})


@pytest.fixture(name="batch", scope="module")
def fixture_batch():
  rng = np.random.default_rng(0)
  rows = lambda n: {
    "x": jnp.asarray(rng.normal(size=(n, 3)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=n), jnp.float32),
  }
  return {**rows(8), "whole": rows(40), "other": rows(8)}


def gradient(w, rows):
  """Of the loss above, by hand."""
  return 2 / len(rows["y"]) * rows["x"].T @ (rows["x"] @ w - rows["y"])


def state_with(perturbation):
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params={"w": jnp.array([0.5, -1.0, 2.0])},
    tx=optax.sgd(0.1),
    perturbation=perturbation,
  )


@pytest.mark.parametrize(
  ("direction", "expected"),
  [
    (directions.full_gradient(), lambda w, b: gradient(w, b["whole"])),
    (
      directions.gradient_noise(),
      lambda w, b: gradient(w, b) - gradient(w, b["whole"]),
    ),
    (directions.other_gradient(), lambda w, b: gradient(w, b["other"])),
    (directions.gradient_ema(0.9), gradient),  # The first gradient, at first.
  ],
)
def test_step_ascends_along_the_direction(batch, direction, expected):
  state = state_with(directions.along(direction, 0.3))
  w = state.params["w"]
  along = expected(w, batch)
  perturbed = w + 0.3 * along / jnp.linalg.norm(along)
  new, metrics = directions.make_step(loss_fn)(state, batch)
  np.testing.assert_allclose(
    new.params["w"], w - 0.1 * gradient(perturbed, batch), rtol=1e-4
  )
  np.testing.assert_allclose(
    metrics["loss"], loss_fn(state.params, None, batch, None)[0], rtol=1e-6
  )


def test_average_alone_is_that_of_the_gradients_before():
  direction = directions.gradient_ema(0.75)
  state = direction.init(jnp.zeros(2))
  first, second = jnp.array([1.0, 2.0]), jnp.array([5.0, -2.0])
  found, state = direction.update(first, state)
  np.testing.assert_allclose(found, first)
  found, state = direction.update(second, state)
  np.testing.assert_allclose(found, first)
  found, state = direction.update(second, state)
  np.testing.assert_allclose(found, 0.75 * first + 0.25 * second)


def test_random_directions_differ_by_run_and_step():
  direction = directions.random_direction()
  drawn = []
  for params in (jnp.ones(50), jnp.full(50, 2.0)):
    state = direction.init(params)
    for _ in range(2):
      found, state = direction.update(jnp.zeros(50), state)
      drawn.append(np.asarray(found))
  cosines = np.corrcoef(drawn) - np.eye(4)
  assert np.all(np.abs(cosines) < 0.5)


@pytest.mark.parametrize(
  "perturbation",
  [
    None,
    fsam_optax.sam_perturbation(0.3),
    fsam_optax.friendly_perturbation(0.3),
  ],
)
def test_step_of_the_studies_is_that_of_the_library(batch, perturbation):
  own, library = state_with(perturbation), state_with(perturbation)
  step = directions.make_step(loss_fn)
  library_step = fsam_optax.make_train_step(loss_fn, jit=False)
  for _ in range(3):
    own, _ = step(own, batch)
    library, _ = library_step(library, {"x": batch["x"], "y": batch["y"]})
  np.testing.assert_allclose(own.params["w"], library.params["w"], rtol=1e-5)


@pytest.fixture(name="context", scope="module")
def fixture_context():
  return bench_lib.Context(
    pool=data.load("digits"),
    model="mlp",
    label_noise=0.2,
    epochs=2,
    batch_size=100,
    search_seeds=[0],
    seeds=[10, 11, 12],
    is_quick=True,
    progress=lambda title, total: lambda: None,
  )


@pytest.fixture(name="bench", scope="module")
def fixture_bench(context):
  arms = {
    "SGD": bench_lib.SGD,
    "F-SAM": bench_lib.FSAM,
    "noise": measures.ARMS["noise"],
  }
  return bench_lib.Bench(
    context, arms, make_step=directions.make_step, with_other_rows=True
  )


def test_runs_come_back_in_order_whatever_runs_at_once(bench):
  # Two at a time, and three: the last is alone with a copy.
  points = [(0.01, 0.1), (0.02, 0.4)]
  runs = bench.run("F-SAM", points, [10, 11, 12])
  assert runs.test_accuracy.shape == (6,)
  again = bench.run("F-SAM", points[1:], [12, 10])
  np.testing.assert_array_equal(again.test_accuracy, runs.test_accuracy[[5, 3]])
  leaf = jax.tree.leaves(runs.params)[0]
  assert leaf.shape[0] == 6
  assert not np.array_equal(leaf[3], leaf[4])


def test_search_takes_the_best_of_the_grid(bench):
  best = bench.search("F-SAM")
  rate, rho, accuracy = max(best.grid, key=lambda point: point[2])
  assert (best.rate, best.rho) == (rate, rho)
  again = bench.run("F-SAM", [(rate, rho)], [0])
  np.testing.assert_allclose(again.validation_accuracy.mean(), accuracy)
  assert "rho" in best.on_edge  # Of two values, each is at an end.


def test_search_goes_beyond_its_values_until_the_best_lies_inside(
  bench, context, monkeypatch
):
  monkeypatch.setattr(bench, "context", context._replace(is_quick=False))
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
    return bench_lib.Runs(accuracy, accuracy, accuracy > 0, None)

  monkeypatch.setattr(bench, "run", run)
  arm = bench_lib.FSAM._replace(rates=(0.0075, 0.015, 0.03), radii=(0.2, 0.4))
  monkeypatch.setitem(bench.arms, "F-SAM", arm)
  best = bench.search("F-SAM")
  np.testing.assert_allclose((best.rate, best.rho), (0.06, 0.05))
  assert best.on_edge == []
  assert len(set(asked)) == len(asked) == len(best.grid)
  monkeypatch.setattr(bench_lib, "_MOST_EXTENSIONS", 1)
  assert bench.search("F-SAM").on_edge == ["learning rate", "rho"]


def test_a_diverged_run_leaves_a_gap(bench, context):
  runs = bench.run("SGD", [(1e30, 0.0)], context.seeds)
  assert runs.diverged.all()
  assert np.all(np.isnan(runs.test_accuracy))
  assert np.all(np.isfinite(runs.validation_accuracy))
  found = measures._measure(bench, "SGD", runs, context)
  assert all(math.isnan(x) for values in found.values() for x in values)
  line = bench_lib.series("SGD", [1, 2], [[3.0, math.nan], [3.0, 4.0]])
  assert line["mean"] == [None, 3.5]
  assert bench_lib.accuracy([3.0, math.nan, 4.0]).endswith("(1 diverged)")
  pairs = bench_lib.difference([3.0, math.nan, 4.0], [1.0, 2.0, 3.0])
  assert pairs[0] == 1.5
  assert bench_lib.difference([math.nan], [1.0])[0] is None
  assert bench_lib.number([math.nan]) == "-"


def test_a_measure_sees_the_rows_that_trained(bench, context):
  runs = bench.run("SGD", [(0.05, 0.0)], context.seeds)
  loss, params, rows = bench.loss_and_data(runs, 1, context.seeds)
  splits = bench.splits([11])
  np.testing.assert_array_equal(rows["y"], splits.train_labels[0])
  np.testing.assert_allclose(rows["x"].mean(), 0, atol=1e-4)
  assert float(loss(params, rows)) < math.log(10)


def test_paired_difference_is_that_of_the_pairs():
  first, second = [3.0, 5.0, 4.0], [1.0, 2.0, 3.0]
  mean, error, p_value = bench_lib.difference(first, second)
  assert mean == 2.0
  np.testing.assert_allclose(error, 1 / math.sqrt(3))
  assert p_value is not None
  assert 0.05 < p_value < 0.1


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
  report.study_figure(result, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["nothing"], "invalid choice: 'nothing'"),
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

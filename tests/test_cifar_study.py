"""The study on CIFAR: its rows, its search and its tables, on other images."""

import pathlib
import sys

import numpy as np
import pytest

from fsam_optax.experiments import data

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import cifar
import pareto


@pytest.fixture(scope="module", name="images")
def fixture_images():
  """Two classes that a glance tells apart: dark and bright."""
  rng = np.random.default_rng(0)

  def draw(number):
    y = rng.integers(0, 2, number).astype(np.int32)
    x = rng.integers(0, 50, (number, 32, 32, 3)) + 150 * y[:, None, None, None]
    return x.astype(np.uint8), y

  return data.Images(
    "toy",
    *draw(700),
    *draw(200),
    classes=2,
    mean=(0.4, 0.4, 0.4),
    standard_deviation=(0.2, 0.2, 0.2),
  )


@pytest.fixture(name="small")
def fixture_small(monkeypatch, images):
  for name, value in {
    "TRAIN": 384,
    "VALIDATION": 200,
    "EPOCHS": 8,
    "BATCH_SIZE": 64,
    "FIRST_SEED": [0],
    "MORE_SEEDS": [1],
    "TEST_SEEDS": [1000, 1001],
    "CURVE_SEEDS": [1000],
    "CURVE": (0.025, 0.4),
    "RATES": (0.025,),
    "RADII": (0.05, 0.1),
  }.items():
    monkeypatch.setattr(cifar, name, value)
  monkeypatch.setattr(cifar.data, "load", lambda *_, **__: images)


def test_rows_of_a_seed_are_apart_and_as_noisy_as_asked(images, small):
  del small
  one, again, other = (cifar.rows_of(images, 0.25, s) for s in (3, 3, 4))
  np.testing.assert_array_equal(one.x, again.x)
  assert (one.x != other.x).any()
  as_set = lambda x: {row.tobytes() for row in x}
  assert not as_set(one.x) & as_set(one.x_validation)
  label_of = {
    x.tobytes(): y for x, y in zip(images.x_train, images.y_train, strict=True)
  }
  wrong = [
    label_of[x.tobytes()] != y for x, y in zip(one.x, one.y, strict=True)
  ]
  assert np.sum(wrong) == 0.25 * 384
  validation = [label_of[x.tobytes()] for x in one.x_validation]
  np.testing.assert_array_equal(one.y_validation, validation)


@pytest.mark.slow
def test_a_job_searches_tests_and_is_not_done_twice(small, tmp_path, capsys):
  del small
  output = tmp_path / "rows.jsonl"
  job = cifar.Job("cifar10-0", "F-SAM", "toy", str(output), is_quick=False)
  job.search_and_test()
  job.curve()
  rows = pareto.read(output)
  found = {
    phase: [row for row in rows if row["phase"] == phase]
    for phase in ("search", "test", "curve")
  }
  (test,) = found["test"]
  first = {
    (row["learning_rate"], row["rho"]): row["accuracy"][0]
    for row in found["search"]
    if row["seeds"] == [0]
  }
  # The best is at no end of the radii that were tried.
  radii = sorted({rho for _, rho in first})
  assert radii[0] < max(first, key=lambda point: first[point])[1] < radii[-1]
  means = {
    (row["learning_rate"], row["rho"]): np.mean(
      [first[row["learning_rate"], row["rho"]], *row["accuracy"]]
    )
    for row in found["search"]
    if row["seeds"] == [1]
  }
  assert len(means) == 3
  assert means[test["learning_rate"], test["rho"]] == max(means.values())
  assert len(test["accuracy"]) == 2
  assert [row["rho"] for row in found["curve"]] == [0.025, 0.4]
  assert {row["learning_rate"] for row in found["curve"]} == {
    test["learning_rate"]
  }
  # It learns what a glance tells apart.
  assert min(test["accuracy"]) > 90
  capsys.readouterr()
  job.search_and_test()
  job.curve()
  assert pareto.read(output) == rows
  assert not capsys.readouterr().out


def test_the_search_goes_on_where_more_seeds_put_the_best_at_an_end(
  small, monkeypatch
):
  """One seed says 0.1, the mean with another 0.05, which was the smallest."""
  del small
  monkeypatch.setattr(cifar, "RADII", (0.05, 0.1, 0.2))
  job = cifar.Job("cifar10-0", "F-SAM", "toy", "unused", is_quick=False)
  tried = []

  def run(phase, point, seeds):
    tried.append((phase, point.rho))
    if phase == "search" and seeds == [0]:
      return [-abs(np.log2(point.rho / 0.1)) / 2]
    return [-abs(np.log2(point.rho / 0.025))]

  monkeypatch.setattr(job, "_run", run)
  job.search_and_test()
  (tested,) = [rho for phase, rho in tried if phase == "test"]
  radii = {rho for phase, rho in tried if phase == "search"}
  assert tested == 0.05
  assert min(radii) < tested < max(radii)


@pytest.mark.slow
def test_a_gated_form_is_given_what_its_gate_let_through(small, tmp_path):
  del small
  output, name = tmp_path / "rows.jsonl", "F-SAM, at long gradients"
  job = cifar.Job("cifar10-40", name, "toy", str(output), is_quick=True)
  job.search_and_test()
  rows = pareto.read(output)
  assert {row["phase"] for row in rows} == {"search", "test"}
  # Six steps an epoch; the first is never longer than those before.
  for row in rows:
    through = 6 * len(row["seeds"]) * (row["gradients"] - 1)
    assert 0 < through < 5 * len(row["seeds"]) + 1e-2
    assert through == pytest.approx(round(through), abs=0.02)
  found = cifar.report_on(rows)["tables"][0]["rows"]
  assert found[0][1] == f"{rows[-1]['gradients']:g}"


def row(arm, phase, rho, accuracy):
  return {
    "setting": "cifar10-40",
    "arm": arm,
    "phase": phase,
    "learning_rate": 0.05,
    "rho": rho,
    "seeds": [0, 1],
    "accuracy": accuracy,
    "diverged": 0,
    "seconds": 1,
  }


def test_tables_hold_the_means_and_paired_differences():
  rows = [
    row("SGD", "test", 0.0, [40.0, 42.0]),
    row("SAM", "test", 0.2, [43.0, 44.0]),
    row("F-SAM", "test", 0.4, [44.0, 46.0]),
    row("SAM", "curve", 0.05, [41.0, 43.0]),
    row("F-SAM", "curve", 0.05, [41.0, 42.0]),
    row("SAM", "curve", 0.1, [42.0, 43.0]),
  ]
  found = cifar.report_on(rows)
  best, curve, settings = found["tables"]
  (panel,) = found["panels"]
  assert best["header"][-3:] == ["over SGD", "over SAM", "over F-SAM"]
  by_form = {cells[0]: cells for cells in best["rows"]}
  # Of 40 and 42 the mean is 41 and its error 1; by hand.
  assert by_form["SGD"][:6] == ["SGD", "1", "0.05", "", "41.00 ± 1.00", ""]
  assert by_form["SGD"][7].startswith("-4.00 ± 0.00")
  assert by_form["SGD"][6].startswith("-2.50 ± 0.50")
  assert by_form["SAM"][4] == "43.50 ± 0.50"
  assert by_form["SAM"][5].startswith("+2.50 ± 0.50")
  assert by_form["F-SAM"][6].startswith("+1.50 ± 0.50")
  (summary,) = settings["rows"]
  assert summary[0] == "cifar10, 40% wrong labels"
  for title, mean in (("SAM over SGD", "+2.50"), ("F-SAM over SAM", "+1.50")):
    cell = summary[settings["header"].index(title)]
    assert cell.startswith(f"{mean} ± 0.50")
  assert summary[settings["header"].index("F-SAM over random direction")] == ""
  # A radius that one of the two lacks is in the figure alone.
  assert [cells[0] for cells in curve["rows"]] == ["0.05"]
  assert curve["rows"][0][3].startswith("-0.50 ± 0.50")
  assert [line["x"] for line in panel["series"]] == [[0.05, 0.1], [0.05]]

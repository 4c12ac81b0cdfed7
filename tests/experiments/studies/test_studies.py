"""The studies: what they write, and how a report shows it."""

import json
import math
import pathlib

from matplotlib.figure import Figure
from printed import plain
import pytest

from fsam_optax import __main__
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import figures
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.studies import study_command

# What a study trains in the suite: all arms, or these. `cifar` needs images;
# `curvature` is run by the gate from the wheel.
ARMS = {
  "cheap-forms": ("SGD", "F-SAM", "in the last 30 %, `start`"),
  "convergence": (),
  "direction": ("F-SAM", "another batch's noise", "full gradient"),
  "ema": (),
  "hyperparameters": ("sigma 1, lmbda 0.9",),
  "label-noise": ("SGD", "F-SAM"),
  "metric": ("F-SAM", "F-ASAM"),
  "momentum": ("F-SAM, momentum",),
  "replicas": ("SAM, local (1)", "F-SAM, default (2)"),
  "rho": (),
}
# Of one, the everyday run sees that it runs.
SLOW = [pytest.param(x, marks=pytest.mark.slow) for x in ARMS if x != "rho"]


def test_cells_show_what_a_mean_alone_would_hide():
  shown = tables.shown
  cell = shown(paired_report.accuracy([80.0, 81.0, 82.0, 20.0]))
  assert cell == "65.75 ± 15.26 (median 80.50, 1 collapsed)"
  cell = shown(paired_report.accuracy([3.0, None, 4.0]))
  assert cell == "3.50 ± 0.50 (1 diverged)"
  pair = paired_report.difference(row([3.0, None, 4.0]), row([1.0, 2.0, 3.0]))
  assert shown(pair) == "+1.50 ± 0.50, median +1.50"
  assert shown(paired_report.difference(row([None]), row([1.0]))) == "-"
  assert shown(paired_report.accuracy([None])) == "- (1 diverged)"
  assert shown(paired_report.number([math.nan])) == "-"
  line = figures.line("SGD", [1, 2], [[3.0, None], [3.0, 4.0]])
  assert line["mean"] == [None, 3.5]


def test_long_names_leave_room_for_what_they_name(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    Figure, "savefig", lambda self, *_, **__: drawn.append(self)
  )
  names = ['12 % of the rows, `ema_gradient="descent"`', "SGD"]
  line = figures.line("", names, [[1.0, 2.0], [3.0, 5.0]])
  panels = [figures.panel("", [line], title=str(i)) for i in range(4)]
  figures.draw("four", panels, tmp_path / "four.png")
  drawn[0].draw_without_rendering()
  for axes in drawn[0].axes:
    assert min(axes.get_position().size) > 0.2
    assert [x.get_text() for x in axes.get_yticklabels()] == names
    assert axes.get_xlabel() == "test accuracy (%)"


def row(accuracy, **more):
  return {
    "learning_rate": 0.1234,
    "rho": 0.2,
    "weight_decay": 0.01,
    "on_edge": [],
    "test_accuracy": accuracy,
    **more,
  }


def test_a_paired_difference_stands_with_its_median():
  of = {"SAM": row([80.0, 81.0, 82.0, 20.0], on_edge=["rho"])}
  of["F-SAM"] = row([83.0] * 4)
  found = paired_report.by_setting(
    {"0.4": of, "0.6": {"SAM": of["SAM"]}}, [("F-SAM", "SAM")], "noise"
  )
  differences, points = found["tables"]
  assert differences["header"] == ["noise", "SAM", "F-SAM", "F-SAM over SAM"]
  # 3, 2, 1 and 63: their mean is 17.25 and their median 2.5.
  cell = tables.shown(differences["rows"][0][3])
  assert cell == "+17.25 ± 15.26, median +2.50"
  assert points["rows"][0][-1] == "rho"
  assert differences["rows"][1][2:] == ["", ""]
  assert found["panels"][0]["series"][1]["mean"] == [83.0, None]


def test_a_table_of_many_arms_is_of_differences_from_one():
  of = {
    "F-SAM": row([4.0, 6.0], gradients=2),
    "SGD": row([3.0, 4.0], rho=None, gradients=1),
  }
  found = paired_report.by_arm({"a": of, "b": {"F-SAM": of["F-SAM"]}}, "F-SAM")
  table, points = found["tables"]
  assert table["header"] == ["", "gradients", "a", "b"]
  shown = [[tables.shown(cell) for cell in cells] for cells in table["rows"]]
  assert shown == [  # The cheaper first.
    ["SGD", "1", "-1.50 ± 0.50", ""],
    ["F-SAM", "2", "5.00 ± 1.00", "5.00 ± 1.00"],
  ]
  assert points["rows"][1][:5] == ["a", "SGD", 0.123, "-", 0.01]
  del of["SGD"]["gradients"]
  table, _ = paired_report.by_arm({"a": of}, "F-SAM")["tables"]
  assert table["header"] == ["", "a"]


def test_a_difference_of_collapsed_runs_has_its_median_and_its_search():
  candidates = [
    {"validation_accuracy": [1.0, 1.0], "test_accuracy": [800.0, 810.0, 1.0]}
  ]
  one = row([80.0, 81.0, 10.0], candidates=candidates)
  flat = [{**candidates[0], "test_accuracy": [70.0, 70.0, 70.0]}]
  other = row([70.0, 70.0, 70.0], candidates=flat)
  found = paired_report.by_arm({"a": {"A": one, "B": other}}, "B")
  cell = found["tables"][0]["rows"][0][1]
  assert cell["median"] == 10.0
  assert cell["error"] > 200  # Without the search it is 23.5.
  # Of one seed no error is known; two draws of two vary less than two do.
  one, other = (row([x], candidates=candidates) for x in (3.0, 1.0))
  assert "search_error" not in paired_report.difference(one, other)
  candidates = [{"validation_accuracy": [1.0], "test_accuracy": [1.0, 3.0]}]
  flat = [{**candidates[0], "test_accuracy": [0.0, 0.0]}]
  one = row([1.0, 3.0], candidates=candidates)
  other = row([0.0, 0.0], candidates=flat)
  assert paired_report.difference(one, other)["search_error"] == 1.0


@pytest.mark.parametrize("name", ["rho", *SLOW])
def test_study_writes_what_it_found(name, tmp_path, capsys):
  arms = ("--arms", *ARMS[name]) if ARMS[name] else ()
  __main__.main(["study", name, "--quick", "--output", str(tmp_path), *arms])
  found = json.loads((tmp_path / f"{name}-quick.json").read_text())
  output = capsys.readouterr().out
  config = found["config"]
  assert found["study"] == name
  assert config["quick"]
  first = study_command.REGISTRY[name].first_seed
  assert config["seeds"] == [first, first + 1]
  assert set(config["versions"]) >= {"fsam_optax", "jax", "matfree"}
  png = (tmp_path / f"{name}-quick.png").read_bytes()
  assert png.startswith(b"\x89PNG")
  assert found["question"] in output
  for table in found["tables"]:
    assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert tables.shown(table["rows"][0][0]) in output
  for panel in found["panels"]:
    assert all(len(s["x"]) == len(s["mean"]) for s in panel["series"])


DOCS = pathlib.Path(__file__).parents[3] / "docs" / "studies"


# Of a study that is not finished there are rows alone.
PUBLISHED = [
  x.stem for x in DOCS.glob("*.json") if (DOCS / f"{x.name}l").exists()
]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_published_rows_give_the_published_tables(name):
  lines = (DOCS / f"{name}.jsonl").read_text().splitlines()
  found = study_command.REGISTRY[name].of_rows(
    [json.loads(line) for line in lines]
  )
  published = json.loads((DOCS / f"{name}.json").read_text())
  for what in ("results", "tables", "panels"):
    assert json.loads(json.dumps(found[what])) == published[what], what


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["nothing"], "must be one of cheap-forms"),
    (["rho", "--first-seed", "23"], "--first-seed: must be an integer in [24"),
    (["rho", "--output", "/dev/null/x"], "argument --output"),
    (["cifar", "--arms", "none"], "argument --arms: must be some of 'SGD'"),
    (["rho", "--arms", "SAM"], "argument --arms: must be left out: rho train"),
    (["curvature", "--seeds", "9"], "argument --seeds: must be at most 8"),
    (["cifar", "--quick"], "argument --cifar10: must be given"),
  ],
)
def test_bad_flag_ends_with_a_message(flags, message, capsys, tmp_path):
  with pytest.raises(SystemExit) as error:
    __main__.main(["study", "--output", str(tmp_path), *flags])
  assert error.value.code == 2
  assert message in plain(capsys.readouterr().err)


def test_no_seed_that_chooses_can_be_reported():
  for study in study_command.REGISTRY.values():
    for setting in study.settings:
      of = lambda what, changes=setting.changes: changes.get(what, ())
      seeds = [*of("search_seeds"), *of("more_seeds")]
      assert max(seeds, default=0) < study_command.FIRST_TO_REPORT, study.name

"""The studies: what they write, and how a report shows it."""

import json
import math

import pytest

from fsam_optax import __main__
from fsam_optax.experiments import studies
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.lab import paired_report

NAMES = sorted(studies.REGISTRY.keys() - {"cifar"})  # Needs its images.
SEVERAL = ("rho",)  # Of which the everyday run sees that they run.
FEW = {
  "cheap-forms": ("--arms", "SGD", "F-SAM", "F-SAM, last 10 %"),
  "replicas": ("--arms", "SAM, local", "F-SAM, default"),
}


def test_cells_show_what_a_mean_alone_would_hide():
  shown = lambda cell: tables.shown(cell)
  values = [80.0, 81.0, 82.0, 20.0]
  cell = shown(paired_report.accuracy(values))
  assert cell.startswith("65.75 ±")
  assert cell.endswith("(median 80.50, 1 collapsed)")
  cell = shown(paired_report.accuracy([3.0, None, 4.0]))
  assert cell == "3.50 ± 0.50 (1 diverged)"
  pairs = shown(paired_report.over([3.0, None, 4.0], [1.0, 2.0, 3.0]))
  assert pairs.startswith("+1.50 ± 0.50, p = 0.2")
  assert shown(paired_report.over([None], [1.0])) == "-"
  assert shown(paired_report.accuracy([None])) == "- (1 diverged)"
  assert shown(paired_report.number([math.nan])) == "-"
  line = paired_report.line("SGD", [1, 2], [[3.0, None], [3.0, 4.0]])
  assert line["mean"] == [None, 3.5]


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
  found = paired_report.by_setting(
    "noise",
    {
      0.4: {
        "SAM": row([80.0, 81.0, 82.0, 20.0], on_edge=["rho"]),
        "F-SAM": row([83.0] * 4),
      }
    },
  )
  differences, points = found["tables"]
  # 3, 2, 1 and 63: their mean is 17.25 and their median 2.5.
  cell = tables.shown(differences["rows"][0][3])
  assert cell.startswith("+17.25 ±")
  assert cell.endswith("median +2.50")
  assert points["rows"][0][-1] == "rho"


def test_a_table_of_arms_has_the_columns_that_tell_them_apart():
  results = {"SAM": row([1.0, 3.0]), "SGD": row([1.0, 2.0], rho=None)}
  table = paired_report.arms_table(results, ["SAM", "F-SAM"], "form")
  header = ["form", "learning rate", "rho", "test accuracy (%)"]
  assert table["header"] == [*header, "over SAM", "over F-SAM"]
  cells = [tables.shown(cell) for cell in table["rows"][1]]
  expected = ["SGD", "0.123", "", "1.50 ± 0.50", "-0.50 ± 0.50, p = 0.5", ""]
  assert cells == expected
  results["SGD"] |= {"on_edge": ["rho"], "weight_decay": 0.1}
  more = paired_report.arms_table(results, [])["header"]
  assert more[3:5] == ["weight decay", "at the end of its values"]
  by_cost = {"SAM": row([1.0], gradients=2), "SGD": row([1.0], gradients=1)}
  rows = paired_report.arms_table(by_cost, [])["rows"]
  assert [cells[:2] for cells in rows] == [["SGD", 1], ["SAM", 2]]


def run_study(name, directory, capsys, *flags):
  __main__.main(["study", name, "--quick", "--output", str(directory), *flags])
  text = (directory / f"{name}.json").read_text()
  return json.loads(text), text, capsys.readouterr().out


def check_study(name, tmp_path, capsys):
  found, text, output = run_study(name, tmp_path, capsys, *FEW.get(name, ()))
  config = found["config"]
  assert found["study"] == name
  assert config["quick"]
  first = studies.REGISTRY[name].first_seed
  assert config["seeds"] == [first, first + 1]
  assert set(config["versions"]) >= {"fsam_optax", "jax", "matfree"}
  assert not set(config["search_seeds"]) & set(config["seeds"])
  assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
  assert found["question"] in output
  for table in found["tables"]:
    assert all(len(row) == len(table["header"]) for row in table["rows"])
    assert tables.shown(table["rows"][0][0]) in output
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


def test_figure_has_a_gap_where_a_value_is_missing(tmp_path):
  series = {
    "label": "SAM",
    "x": [1, 2, 3],
    "mean": [1.0, None, 2.0],
    "error": [None, None, 0.1],
  }
  points = series | {"is_points": True, "names": ["a", "b", "c"]}
  panels = [paired_report.panel("rho", [series, points])] * 5
  paired_report.draw("rho", panels, tmp_path / "figure.png")
  assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["nothing"], "argument study: must be one of batch-size, cheap-forms"),
    (["rho", "--seeds", "0"], "argument --seeds"),
    (["rho", "--first-seed", "3"], "argument --first-seed"),
    (["rho", "--data", "nothing.npz"], "argument --data"),
    (["rho", "--output", "/dev/null/x"], "argument --output"),
    (["rho", "--label-noise", "1"], "argument --label-noise"),
    (["rho", "--arms", "SGD"], "argument --arms: must be some of 'SAM'"),
    (["cifar", "--quick"], "argument --cifar10: must be given"),
  ],
)
def test_bad_flag_ends_with_a_message(
  flags, message, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as error:
    __main__.main(["study", *flags])
  assert error.value.code == 2
  assert message in capsys.readouterr().err

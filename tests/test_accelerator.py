"""The command for a machine with an accelerator, as it runs on a CPU."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest
import step_cost

pytestmark = pytest.mark.slow

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "accelerator.py"


def run(folder, *flags, **environment):
  """The status, what it printed and the report."""
  output = folder / "report.json"
  done = subprocess.run(
    [sys.executable, str(SCRIPT), f"--output={output}", *flags],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=300,
  )
  report = json.loads(output.read_text()) if output.exists() else None
  return done, report


# Every process that starts finds one perturbation a thousandth too long.
BROKEN = """
import fsam_optax
right = fsam_optax.friendly_perturbation
def wrong(rho=0.05, *args, order="official", **kwargs):
  longer = 1.001 if order == "paper" else 1
  return right(longer * rho, *args, order=order, **kwargs)
fsam_optax.friendly_perturbation = wrong
"""
NAMES = [
  "test_laws.py::test_perturbation_has_norm_rho[official]",
  "test_laws.py::test_perturbation_has_norm_rho[paper]",
  "test_laws.py::test_lmbda_one_freezes_the_ema",
  "test_golden.py::test_every_face_walks_the_authors_path[sgd_default-train_step]",
]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  folder = tmp_path_factory.mktemp("quick")
  (folder / "sitecustomize.py").write_text(BROKEN)
  return run(
    folder,
    *("--quick", "--parts", "checks", "cost", "peak"),
    *("--checks", "test_perturbation_has", "freezes", "sgd_default-train_step"),
    PYTHONPATH=str(folder),
  )


def test_what_passes_here_passes_there_and_a_broken_law_fails(quick):
  done, report = quick
  assert done.returncode == 1, done.stdout + done.stderr
  outcomes = {row["check"]: row["passed"] for row in report["checks"]}
  assert outcomes == {name: "paper" not in name for name in NAMES}
  for row in report["checks"]:
    outcome = "PASS" if row["passed"] else "FAIL"
    assert f"{outcome} {row['check']}" in done.stdout
  assert "Not equal to tolerance" in report["checks"][1]["message"]
  assert "3 of 4 checks pass" in done.stdout
  # And the report says where.
  (device,) = report["device"]
  assert device["platform"] == "cpu"
  assert device["versions"]["jax"] == jax.__version__


def test_the_costs_are_of_steps_that_were_timed(quick):
  _, report = quick
  costs = {row["step"]: row for row in report["cost"]}
  names = ["SGD", "floor", "fsam in a chain", "train step (default)"]
  assert list(costs) == names
  for row in costs.values():
    # Two convolutions and one of the stem, 3 x 3, of 8 channels; BatchNorm;
    # a linear layer for 10 classes.
    assert row["parameters"] == 9 * 8 * (3 + 8 + 8) + 3 * 2 * 8 + 8 * 10 + 10
    assert row["milliseconds"] > 0
  assert costs["floor"]["ratio_to_floor"] == costs["SGD"]["ratio_to_sgd"] == 1
  # A second gradient doubles the work.
  flops = costs["floor"]["flops"] / costs["SGD"]["flops"]
  assert flops == pytest.approx(2, rel=0.05)
  assert costs["fsam in a chain"]["words_above_floor"] == pytest.approx(7, 0.1)
  # A CPU does not know its peak.
  assert [row["peak_bytes"] for row in report["peak"]] == [None]
  assert report["errors"] == report["skipped"] == report["train"] == []


def test_no_budget_skips_everything_and_says_so(tmp_path):
  done, report = run(tmp_path, "--quick", "--budget=0")
  assert done.returncode == 0, done.stdout + done.stderr
  skipped = {row["job"]: row["reason"] for row in report["skipped"]}
  assert {"device", "checks"} < skipped.keys()
  assert any(name.startswith("cost of ") for name in skipped)
  assert any(name.startswith("train ") for name in skipped)
  assert set(skipped.values()) == {"the budget was spent"}
  assert report["checks"] == report["cost"] == report["train"] == []


def test_a_job_that_dies_is_an_error_and_loses_no_other(tmp_path):
  flags = ("--quick", "--parts", "cost")
  done, report = run(tmp_path, *flags, XLA_FLAGS="--no_such_flag=1")
  assert done.returncode == 1
  jobs = [row["job"] for row in report["errors"]]
  assert jobs == ["device", "cost of resnet-tiny, 8 rows, quick"]
  assert all("no_such_flag" in row["reason"] for row in report["errors"])


def test_a_step_is_predicted_by_what_bounds_it():
  row = {"model": "perceptron", "parameters": 10**9, "main_memory_words": 8}
  rows = [
    {**row, "step": "SGD", "flops": 1e9},  # 32 GB.
    {**row, "step": "twice the bytes", "main_memory_words": 16, "flops": 1e9},
    # A second of TF32, for 32 / 3350 of one.
    {**row, "step": "many operations", "flops": 495e12},
  ]
  step_cost.predict(rows, "NVIDIA H100 80GB HBM3")
  ratios = [row["predicted_ratio_to_sgd"] for row in rows]
  assert ratios == pytest.approx([1, 2, 3350 / 32])
  exact = [row["predicted_ratio_in_float32"] for row in rows]
  assert exact == pytest.approx([1, 2, 495 / 67 * 3350 / 32])
  unknown = [{**row, "step": "SGD", "flops": 1e9}]
  step_cost.predict(unknown, "cpu")
  assert "predicted_ratio_to_sgd" not in unknown[0]

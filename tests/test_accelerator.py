"""The command for a machine with an accelerator, as it runs on a CPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


def run(folder, *flags, script="accelerator.py", **environment):
  """The status, what it printed and the report."""
  output = folder / "report.json"
  done = subprocess.run(
    [sys.executable, str(BENCHMARKS / script), f"--output={output}", *flags],
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=300,
  )
  report = json.loads(output.read_text()) if output.exists() else None
  return done, report


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
  return run(
    tmp_path_factory.mktemp("quick"),
    *("--quick", "--parts", "checks", "cost"),
    *("--checks", "norm_rho", "lmbda_one_freezes", "sgd_default-train_step"),
  )


NAMES = [
  "test_laws.py::test_perturbation_has_norm_rho[official]",
  "test_laws.py::test_perturbation_has_norm_rho[paper]",
  "test_laws.py::test_perturbation_of_16_million_weights_has_norm_rho",
  "test_laws.py::test_adaptive_perturbation_has_norm_rho_relative_to_the_weights",
  "test_laws.py::test_lmbda_one_freezes_the_ema",
  "test_golden.py::test_every_face_walks_the_authors_path[sgd_default-train_step]",
]


def test_what_passes_here_passes_there(quick):
  done, report = quick
  assert done.returncode == 0, done.stdout + done.stderr
  assert [row["check"] for row in report["checks"]] == NAMES
  for row in report["checks"]:
    assert row["passed"], row
    assert f"PASS {row['check']}" in done.stdout
  # And the report says where.
  assert report["device"]["platform"] == "cpu"
  assert report["device"]["versions"]["jax"] == jax.__version__


def test_the_costs_are_of_steps_that_were_timed(quick):
  _, report = quick
  costs = {row["step"]: row for row in report["cost"]}
  assert list(costs) == [
    "SGD",
    "floor",
    "fsam in a chain",
    "train step (default)",
  ]
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


def test_what_a_cpu_does_not_know_and_was_not_asked_for_is_named(quick):
  _, report = quick
  assert [row["peak_bytes"] for row in report["peak"]] == [None]
  assert report["errors"] == report["skipped"] == report["train"] == []


# Perturbations that are a thousandth too long, in every process that starts.
BROKEN = """
import fsam_optax
right = fsam_optax.friendly_perturbation
fsam_optax.friendly_perturbation = lambda rho=0.05, *args, **kwargs: right(
  1.001 * rho, *args, **kwargs
)
"""


def test_a_law_that_is_broken_fails(tmp_path):
  (tmp_path / "sitecustomize.py").write_text(BROKEN)
  done, report = run(
    tmp_path,
    *("--quick", "--parts", "checks"),
    *("--checks", "norm_rho", "lmbda_one_freezes", "sgd_default-train_step"),
    PYTHONPATH=str(tmp_path),
  )
  assert done.returncode == 1, done.stdout + done.stderr
  outcomes = {row["check"]: row["passed"] for row in report["checks"]}
  assert outcomes == {name: "freezes" in name for name in NAMES}
  assert "Not equal to tolerance" in report["checks"][0]["message"]
  assert f"FAIL {NAMES[0]}" in done.stdout
  assert "1 of 6 checks pass" in done.stdout


def test_no_budget_skips_everything_and_says_so(tmp_path):
  done, report = run(tmp_path, "--quick", "--budget=0")
  assert done.returncode == 0, done.stdout + done.stderr
  skipped = {row["job"]: row["reason"] for row in report["skipped"]}
  spent = "the budget was spent"
  assert {"device", "checks"} < skipped.keys()
  assert any(name.startswith("cost of ") for name in skipped)
  assert any(name.startswith("train ") for name in skipped)
  assert set(skipped.values()) == {spent}
  assert report["checks"] == report["cost"] == report["train"] == []


def test_a_job_that_dies_is_an_error_and_loses_no_other(tmp_path):
  done, report = run(
    tmp_path,
    *("--quick", "--parts", "checks", "cost", "--checks", "lmbda_one"),
    XLA_FLAGS="--no_such_flag=1",
  )
  assert done.returncode == 1
  jobs = [row["job"] for row in report["errors"]]
  assert jobs[:2] == ["device", "checks"]
  assert any(name.startswith("cost of ") for name in jobs)
  assert all("no_such_flag" in row["error"] for row in report["errors"])


@pytest.mark.parametrize(
  ("kind", "compiler"), [("tpu", "libtpu"), ("gpu", "jax_cuda12_plugin")]
)
def test_counts_for_an_absent_device_say_what_they_need(
  tmp_path, kind, compiler
):
  if importlib.util.find_spec(compiler) is not None:
    pytest.skip(f"{compiler} is here")
  done, _ = run(tmp_path, f"--{kind}", script="step_cost.py")
  assert done.returncode == 2
  assert done.stderr.endswith(
    f'error: --{kind} needs its compiler. Run: pip install -e ".[pod]"\n'
  )


def test_a_step_is_predicted_by_what_bounds_it(monkeypatch):
  monkeypatch.syspath_prepend(BENCHMARKS)
  step_cost = importlib.import_module("step_cost")
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

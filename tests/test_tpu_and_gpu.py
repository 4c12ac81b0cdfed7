"""Compiled for TPUs and GPUs that are not there: what the steps communicate.

Needs the extra `pod`; the gate runs it in an environment of its own.
"""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin"))),
    reason='needs the compilers: pip install -e ".[pod]"',
  ),
]

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS, MEASURED = ROOT / "benchmarks", ROOT / "docs" / "measurements"
SMALL, MIDDLE, LARGE = "v5e:2x2", "v5e:4x4", "v5e:16x16"
OTHER, GPUS = "v4:2x2x2", "h100:4x8"
# With a named axis: the words that a mode all-reduces a parameter, and those
# of them that the second pass waits for.
MODES = [
  ("SGD", SMALL, 1, 0),
  *(("lean", topology, 1, 0) for topology in (SMALL, LARGE, OTHER, GPUS)),
  *(("default", topology, 2, 1) for topology in (SMALL, LARGE, GPUS)),
  ("micro-batches", SMALL, 2, 1),
  ("local", SMALL, 2, 0),
]
# Here the compiler has to find out by itself what crosses the chips.
JIT = ("jit-SGD", "jit-micro-batches", "fsdp")
PROGRAM = """
import json, sys, pod
for names in json.loads(sys.argv[1]):
  print(json.dumps(pod.mode_row(*names)))
"""


@pytest.fixture(scope="module")
def rows():
  """The rows of pod.py by topology and mode, all from one process."""
  wanted = [
    *(("perceptron-narrow", mode, topology) for mode, topology, *_ in MODES),
    *(("transformer-narrow", mode, SMALL) for mode in JIT),
    ("transformer-narrow", "fsdp", MIDDLE),
  ]
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, json.dumps(wanted)],
    cwd=BENCHMARKS,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  parsed = map(json.loads, done.stdout.splitlines())
  return {(row["topology"], row["mode"]): row for row in parsed}


def words(row):
  # No collective moves the batch: each sums what has the parameters' size.
  assert row["words"].keys() == {"all-reduce"}
  return row["words"]["all-reduce"]


@pytest.mark.parametrize(("mode", "topology", "all_reduced", "between"), MODES)
def test_a_mode_all_reduces_its_words_and_waits_for_some(
  mode, topology, all_reduced, between, rows
):
  row = rows[topology, mode]
  assert words(row) == pytest.approx(all_reduced, abs=1e-3)
  assert row["words_between"] == pytest.approx(between, abs=1e-3)
  assert row["between"] == between
  if all_reduced == 1:
    assert row["collectives"] == 1


def test_under_jit_it_all_reduces_twice_what_sgd_does_there(rows):
  # The compiler sums the two uses of the tied embedding apart.
  sgd, f_sam = (words(rows[SMALL, mode]) for mode in JIT[:2])
  assert 1 <= sgd < 1.25
  assert f_sam == pytest.approx(2 * sgd, rel=1e-3)


@pytest.mark.parametrize("mode", ["default", "lean"])
def test_what_a_chip_does_and_keeps_is_the_same_on_4_and_256(mode, rows):
  small, large = rows[SMALL, mode], rows[LARGE, mode]
  assert (small["chips"], large["chips"]) == (4, 256)
  for count in ("flops", "bytes", "temporary_bytes", "state_bytes"):
    assert large[count] == pytest.approx(small[count], rel=0.05), count


def test_fsdp_keeps_one_part_of_the_state_on_each_chip(rows):
  whole = rows[SMALL, "jit-micro-batches"]["state_bytes"]
  few, many = rows[SMALL, "fsdp"], rows[MIDDLE, "fsdp"]
  # Biases and norms, with fewer elements than the rule splits, are whole.
  assert few["state_bytes"] == pytest.approx(whole / 4, rel=0.03)
  assert many["state_bytes"] == pytest.approx(whole / 16, rel=0.12)
  # What the program takes, padded to the chip's tiles and with the batch.
  assert few["argument_bytes"] > 3.4 * many["argument_bytes"]


@pytest.mark.parametrize("topology", [SMALL, MIDDLE])
def test_fsdp_gathers_parameters_and_no_activations(topology, rows):
  row = rows[topology, "fsdp"]
  largest = max(math.prod(shape) for shape in row["parameter_shapes"])
  gathered = [math.prod(s) for s in row["shapes"]["all-gather"]]
  assert gathered
  # The smallest activation of all chips together has 8 times as many elements.
  assert max(gathered) <= largest
  # Each pass gathers the parameters forwards and, but for some, backwards.
  assert row["words"]["all-gather"] < 5


def test_the_step_of_the_train_command_compiles_for_a_chip(tmp_path):
  path = tmp_path / "rows.jsonl"
  subprocess.run(
    [
      *(sys.executable, BENCHMARKS / "pod.py", f"--output={path}"),
      *("--chips=1", "--topologies", SMALL, "--train"),
      "--model cnn --depth 2 --width 8 --dtype bfloat16",
    ],
    check=True,
  )
  row = json.loads(path.read_text())
  assert (row["chips"], row["mode"]) == (1, "fsam")
  assert row["words"] == {}
  assert row["temporary_bytes"] > 0
  # Parameters, momentum, average, and what is small besides.
  assert row["state_bytes"] > 3 * 4 * row["parameters"]


# What a step moves, and holds beside its state, on one device: words and trees
# of the perceptron's 141 million parameters, above the floor of two gradients.
MOST = {
  "tpu": {
    "fsam in a chain": (7.4, 0.55),
    "train step (default)": (8.7, 0.55),
    "train step, paper order": (8.7, 0.55),
    "train step, average of the descent": (8.3, 0.55),
    "train step, momentum as the average": (5.5, 0.55),
    "train step, every 2nd": (9.5, 1.9),
  },
  "gpu": {
    "fsam in a chain": (7.2, 0.5),
    "train step (default)": (8.2, 0.5),
    "train step, average of the descent": (8.2, 0.1),
    "train step, momentum as the average": (6.3, 0.1),
    "train step, adaptive": (10.2, 0.5),
    # In one graph: what goes into the second pass, beside what comes out.
    "train step, every 2nd": (7.2, 1.1),
  },
}
PARTED = ("train step, 4 micro-batches", "train step, 4 local")


def by_step(path):
  """The costs of the perceptron on a batch of 128."""
  setting = ("perceptron", 128)
  rows = json.loads(path.read_text())["rows"]
  return {
    x["step"]: x for x in rows if (x["model"], x["batch_size"]) == setting
  }


@pytest.fixture(scope="module", params=MOST)
def costs(request, tmp_path_factory):
  """A kind of device, and its rows by step."""
  path = tmp_path_factory.mktemp("cost") / "rows.json"
  subprocess.run(
    [
      *(sys.executable, BENCHMARKS / "step_cost.py", f"--{request.param}"),
      *("--models", "perceptron", "--output", path),
      *("--steps", "floor", *MOST[request.param], *PARTED),
    ],
    check=True,
  )
  return request.param, by_step(path)


def test_a_step_on_a_device_pays_what_its_arithmetic_needs(costs):
  kind, rows = costs
  for step, (most_words, most_trees) in MOST[kind].items():
    above = lambda count, row=rows[step]: row[count] - rows["floor"][count]
    words = above("words" if kind == "tpu" else "main_memory_words")
    assert words <= most_words, step
    assert above("temporary_words") <= most_trees, step
    # Less than the arithmetic itself would be a mistake of the count: the
    # average and the direction are written, and read again.
    assert above("main_memory_words") >= 4, step


def test_micro_batches_on_a_device_cost_what_they_did_by_hand(costs):
  kind, rows = costs
  stored = by_step(MEASURED / f"step_cost_{kind}.json")
  for step in PARTED:
    by_hand = stored[step.replace("train step", "F-SAM by hand")]
    ours = rows[step]
    assert ours["main_memory_words"] <= by_hand["main_memory_words"] + 1, step
    assert ours["temporary_words"] <= by_hand["temporary_words"] + 0.2, step

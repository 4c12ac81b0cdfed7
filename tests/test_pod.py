"""Compiled for TPUs and GPUs that are not there: what the steps communicate.

Needs the extra `pod`; the gate runs it in an environment of its own.
"""

import functools
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

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "pod.py"
SMALL, LARGE, OTHER = "v5e:2x2", "v5e:16x16", "v4:2x2x2"
GPUS = "h100:4x8"
NAMED_AXIS = ("default", "local", "lean", "micro-batches")
JIT = ("jit-SGD", "jit-micro-batches")


def compile_rows(path, topologies, modes):
  subprocess.run(
    [
      sys.executable,
      str(SCRIPT),
      "--model=transformer-narrow",
      f"--output={path}",
      "--topologies",
      *topologies,
      "--modes",
      *modes,
    ],
    check=True,
  )


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
  path = tmp_path_factory.mktemp("pod") / "rows.jsonl"
  compile_rows(path, [SMALL], ["SGD", *NAMED_AXIS, *JIT, "fsdp"])
  compile_rows(path, [LARGE, GPUS], ["SGD", "default", "lean"])
  compile_rows(path, ["v5e:4x4"], ["fsdp"])
  compile_rows(path, [OTHER], ["lean"])
  parsed = map(json.loads, path.read_text().splitlines())
  return {(row["topology"], row["mode"]): row for row in parsed}


def words(row):
  assert row["words"].keys() == {"all-reduce"}
  return row["words"]["all-reduce"]


@pytest.mark.parametrize("topology", [SMALL, LARGE, OTHER, GPUS])
def test_lean_all_reduces_what_sgd_does_in_one_place(topology, rows):
  for mode in ("lean", "SGD") if topology != OTHER else ("lean",):
    assert words(rows[topology, mode]) == pytest.approx(1, abs=1e-3)
    assert rows[topology, mode]["collectives"] == 1
  assert rows[topology, "lean"]["between"] == 0


@pytest.mark.parametrize("topology", [SMALL, LARGE, GPUS])
def test_the_default_all_reduces_twice_and_waits_for_one(topology, rows):
  row = rows[topology, "default"]
  assert words(row) == pytest.approx(2, abs=1e-3)
  assert row["words_between"] == pytest.approx(1, abs=1e-3)
  assert row["between"] == 1


def test_under_jit_it_all_reduces_twice_what_sgd_does_there(rows):
  # The compiler sums the two uses of the tied embedding apart.
  sgd, f_sam = (words(rows[SMALL, mode]) for mode in JIT)
  assert 1 <= sgd < 1.25
  assert f_sam == pytest.approx(2 * sgd, rel=1e-3)


def test_a_local_ascent_leaves_nothing_between_the_passes(rows):
  row = rows[SMALL, "local"]
  assert words(row) == pytest.approx(2, abs=1e-3)
  assert row["between"] == 0


@pytest.mark.parametrize("mode", ["SGD", *NAMED_AXIS])
def test_no_collective_moves_the_batch(mode, rows):
  # Nothing but sums of what has the parameters' size, or a scalar's.
  expected = 1 if mode == "SGD" or "lean" in mode else 2
  assert words(rows[SMALL, mode]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("mode", ["SGD", "default", "lean"])
def test_what_a_chip_does_and_keeps_is_the_same_on_4_and_256(mode, rows):
  small, large = rows[SMALL, mode], rows[LARGE, mode]
  assert (small["chips"], large["chips"]) == (4, 256)
  for count in ("flops", "bytes", "temporary_bytes", "state_bytes"):
    assert large[count] == pytest.approx(small[count], rel=0.05), count


def test_fsdp_keeps_one_part_of_the_state_on_each_chip(rows):
  whole = rows[SMALL, "default"]["state_bytes"]
  few, many = rows[SMALL, "fsdp"], rows["v5e:4x4", "fsdp"]
  # Biases and norms, with fewer elements than the rule splits, are whole.
  assert few["state_bytes"] == pytest.approx(whole / 4, rel=0.03)
  assert many["state_bytes"] == pytest.approx(whole / 16, rel=0.12)
  # What the program takes, padded to the chip's tiles and with the batch.
  assert few["argument_bytes"] > 3.4 * many["argument_bytes"]


def test_the_step_of_the_train_command_compiles_for_a_chip(tmp_path):
  path = tmp_path / "rows.jsonl"
  subprocess.run(
    [
      *(sys.executable, str(SCRIPT), f"--output={path}", "--chips=1"),
      *("--topologies", SMALL, "--train"),
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


@pytest.mark.parametrize("topology", [SMALL, "v5e:4x4"])
def test_fsdp_gathers_parameters_and_no_activations(topology, rows):
  row = rows[topology, "fsdp"]
  largest = max(math.prod(shape) for shape in row["parameter_shapes"])
  gathered = [math.prod(s) for s in row["shapes"]["all-gather"]]
  assert gathered
  # The smallest activation of all chips together has 8 times as many elements.
  assert max(gathered) <= largest
  # Each pass gathers the parameters forwards and, but for some, backwards.
  assert row["words"]["all-gather"] < 5


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
PARTED = ("4 micro-batches", "4 local")


@pytest.fixture(scope="module")
def costs_of(tmp_path_factory):
  """The rows of a kind of device by step, in words, and trees beside them."""

  @functools.cache
  def measure(kind):
    path = tmp_path_factory.mktemp("cost") / "rows.json"
    parted = [
      f"{who}, {x}" for who in ("F-SAM by hand", "train step") for x in PARTED
    ]
    subprocess.run(
      [
        *(sys.executable, str(BENCHMARKS / "step_cost.py"), f"--{kind}"),
        *("--models", "perceptron", "--output", str(path)),
        *("--steps", "floor", *MOST[kind], *parted),
      ],
      check=True,
    )
    rows = json.loads(path.read_text())["rows"]
    return {row["step"]: row for row in rows}

  return measure


@pytest.mark.parametrize(
  ("kind", "step"), [(kind, step) for kind in MOST for step in MOST[kind]]
)
def test_a_step_on_a_device_pays_what_its_arithmetic_needs(
  kind, step, costs_of
):
  most_words, most_trees = MOST[kind][step]
  row, floor = costs_of(kind)[step], costs_of(kind)["floor"]
  above = lambda count: row[count] - floor[count]
  assert above("words" if kind == "tpu" else "main_memory_words") <= most_words
  assert above("temporary_words") <= most_trees
  # Less than the arithmetic itself would be a mistake of the count: the average
  # and the direction are written, and read again.
  assert above("main_memory_words") >= 4


@pytest.mark.parametrize("parts", PARTED)
@pytest.mark.parametrize("kind", MOST)
def test_micro_batches_on_a_device_cost_what_they_do_by_hand(
  kind, parts, costs_of
):
  ours = costs_of(kind)[f"train step, {parts}"]
  by_hand = costs_of(kind)[f"F-SAM by hand, {parts}"]
  assert ours["main_memory_words"] <= by_hand["main_memory_words"] + 1
  assert ours["temporary_words"] <= by_hand["temporary_words"] + 0.2

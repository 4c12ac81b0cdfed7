"""Files of a run, damaged by seed: right numbers or one sentence."""

import contextlib
import gc
import json
import random
import shutil
import sys

import jax
import numpy as np
import pytest
from small_program import mesh_of
from small_program import program_of

from fsam_optax.experiments.train import checkpoints
from fsam_optax.experiments.train import folder
from fsam_optax.experiments.train import metrics
from fsam_optax.experiments.train.folder import FolderError

pytestmark = pytest.mark.slow


def mutated(content, rng):
  """Bytes with one to three of them flipped, cut, doubled or inserted."""
  content = bytearray(content)
  for _ in range(rng.randint(1, 3)):
    at = rng.randrange(len(content) or 1)
    match rng.randrange(5):
      case 0 if content:
        content[at] ^= 1 << rng.randrange(8)
      case 1:
        del content[at:]
      case 2:
        del content[at : at + rng.randint(1, 40)]
      case 3:
        content[at:at] = content[at : at + rng.randint(1, 40)]
      case _:
        content[at:at] = rng.randbytes(rng.randint(1, 8))
  return bytes(content)


def one_sentence(error):
  text = str(error)
  assert "\n" not in text
  assert all(x.isprintable() for x in text)


def test_metrics(tmp_path):
  """What is read was written, and no epoch is missing from it."""
  path = tmp_path / "metrics.jsonl"
  journal = metrics.Journal(path, 0, 0)
  rng = random.Random(0)
  for batches in range(1, 13):
    kind = "step" if batches % 3 else "epoch"
    line = {"kind": kind, "batches": batches, "epoch": batches / 3}
    for name in ("loss", "accuracy", "test_accuracy"):
      line[name] = rng.uniform(0, 100)
    if kind == "epoch":
      line["epoch"] = batches // 3
    journal.append(line)
  written, whole, refused = journal.lines, path.read_bytes(), 0
  for _ in range(1000):
    path.write_bytes(mutated(whole, rng))
    try:
      found = metrics.Journal(path, 12, 4)
    except FolderError as error:
      one_sentence(error)
      refused += 1
      continue
    assert all(line in written for line in found.lines)
    assert {line["epoch"] for line in found.epochs} == {1, 2, 3, 4}
  assert 100 < refused < 1000


def test_config(tmp_path):
  """A run goes on by the flags that it was begun with, or not at all."""
  config = {"--rho": 0.2, "--mean": [0.5, 0.25], "--model": "resnet"}
  folder.check_config(tmp_path, config)
  path, rng, refused = tmp_path / "config.json", random.Random(1), 0
  whole = path.read_bytes()
  begun = json.loads(whole)
  begun.pop("versions")
  for _ in range(900):
    path.write_bytes(mutated(whole, rng))
    try:
      folder.check_config(tmp_path, config)
    except FolderError as error:
      one_sentence(error)
      refused += 1
      continue
    found = json.loads(path.read_bytes())
    found.pop("versions", None)
    assert found == begun
  assert refused > 500


def test_checkpoints(tmp_path, monkeypatch):
  """The numbers of this checkpoint, or of the one before with a warning."""
  # What Orbax had begun to read is dropped where another part fails: in here,
  # and not whenever the memory is collected, in the midst of another test.
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
  program = program_of(mesh_of(1), model="mlp", depth=1, width=2)
  states = {n: program.place(program.create(n)) for n in (0, 1)}
  expected = {n: jax.device_get(x.state.params) for n, x in states.items()}
  states[1] = states[1].replace(batches=states[1].batches + 1)
  saved = checkpoints.Checkpoints(tmp_path / "whole" / "checkpoints", print)
  for number, state in states.items():
    saved.save(number, state, {"loss": [1.0, float(number)]}, 50.0 + number)
  saved.wait()
  saved.close()
  rng, ends = random.Random(2), []
  for i in range(100):
    run = tmp_path / f"run-{i}"
    shutil.copytree(tmp_path / "whole", run)
    victims = [
      x
      for x in sorted((run / "checkpoints" / "1").rglob("*"))
      if x.is_file() and x.stat().st_size
    ]
    victim = rng.choice(victims)
    victim.write_bytes(mutated(victim.read_bytes(), rng))
    warnings = []
    try:
      with contextlib.closing(
        checkpoints.Checkpoints(run / "checkpoints", warnings.append)
      ) as opened:
        progress, means = opened.restore(program.abstract())
    except FolderError as error:
      one_sentence(error)
      ends.append("refused")
      continue
    number = int(progress.batches)
    assert means == {"loss": [1.0, float(number)]}
    jax.tree.map(
      np.testing.assert_array_equal, progress.state.params, expected[number]
    )
    assert number == 1 or any("cannot be read" in x for x in warnings)
    ends.append(number)
    shutil.rmtree(run)
  gc.collect()
  assert {0, 1} <= set(ends)

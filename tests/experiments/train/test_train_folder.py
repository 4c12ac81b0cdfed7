"""The folder of a run, its journal and its checkpoints, without a run."""

import contextlib
import dataclasses
import gc
import json
import pathlib
import sys

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from meshes import make_mesh
import numpy as np
import pytest
from small_program import program_of

from fsam_optax.experiments import data
from fsam_optax.experiments.train import checkpoints as checkpoints_lib
from fsam_optax.experiments.train import journal as journal_lib
from fsam_optax.experiments.train import loop
from fsam_optax.experiments.train import run_folder
from fsam_optax.experiments.train.run_folder import RunError

OLDER = {"--rho": 0.2, "--mean": [0.5, 0.5], "--data (SHA-256)": "abc"}
CONFIG = {**OLDER, "--mask": "none"}


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_no_link_in_the_place_of_the_lock_is_followed(link, tmp_path):
  precious = tmp_path / "precious"
  precious.write_text("all there is")
  getattr(tmp_path / "lock", link)(precious)
  with contextlib.suppress(RunError), run_folder.lock(tmp_path):
    pass
  assert precious.read_text() == "all there is"


def check_config(path, config):
  return run_folder.check_config(path, config, {"--mask": "none"})


def test_what_the_folder_was_begun_with_is_named(tmp_path):
  assert check_config(tmp_path, OLDER) == ""  # Before there was a --mask.
  assert check_config(tmp_path, CONFIG) == ""
  with pytest.raises(RunError, match="begun with --mask none, got norms"):
    check_config(tmp_path, {**CONFIG, "--mask": "norms_only"})
  with pytest.raises(RunError, match=r"begun with --rho 0\.2, got 0\.1\. G"):
    check_config(tmp_path, {**CONFIG, "--rho": 0.1})
  path = tmp_path / "config.json"
  begun = json.loads(path.read_text())
  begun["versions"]["jax"] = "0.0.1"
  path.write_text(json.dumps(begun))  # A newer JAX may go on.
  said = check_config(tmp_path, CONFIG)
  assert said == f"jax 0.0.1 then, {jax.__version__} now"
  path.write_text(json.dumps({**begun, "--data (SHA-256)": "\x1b]0;x\x07"}))
  with pytest.raises(RunError, match=r"\\x1b\]0;x\\x07, got abc") as found:
    check_config(tmp_path, CONFIG)
  assert str(found.value).isprintable()


@pytest.mark.parametrize(
  "text", ["null", "{", "[" * 100_000], ids=["null", "cut", "deep"]
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(RunError, match="must be the JSON that this program"):
    check_config(tmp_path, CONFIG)


def test_checkpoints_without_their_config_are_not_gone_on_from(tmp_path):
  (tmp_path / "seed-1" / "checkpoints" / "40").mkdir(parents=True)
  with pytest.raises(RunError, match=r"config.json' must lie beside"):
    check_config(tmp_path, CONFIG)
  assert not (tmp_path / "config.json").exists()


def line_of(kind, batches, **more):
  numbers = {"loss": 1.0, "accuracy": 50.0, "sharpness": 0.0, "skipped": 0}
  more |= {"images_per_second": 9.0, "waiting_fraction": 0.0}
  return {"kind": kind, "batches": batches, "epoch": batches / 4, **numbers,
          "test_accuracy": 40.0, **more}  # fmt: skip


def test_a_seed_whose_checkpoints_are_gone_is_not_begun_anew(tmp_path):
  journal_lib.check_new(tmp_path)
  lines = [json.dumps(line_of("epoch", 4 * i)) + "\n" for i in (1, 2, 3)]
  # Of the first two a checkpoint may not have been whole when it was killed.
  (tmp_path / "metrics.jsonl").write_text("".join(lines[:2]))
  journal_lib.check_new(tmp_path)
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  with pytest.raises(RunError, match="must be there, for 3 epochs"):
    journal_lib.check_new(tmp_path)


def test_a_journal_has_the_epochs_of_the_checkpoint_and_its_steps(tmp_path):
  path = tmp_path / "metrics.jsonl"
  foreign = [line_of("epoch", 4, loss=9.0), line_of("step", 6)]
  written = [line_of("step", 2), line_of("step", 4), *foreign]
  text = "".join(json.dumps(line) + "\n" for line in written)
  path.write_text(text + "null\n[3]\n" + "[" * 100_000 + '\n{"kin')
  epochs = [line_of("epoch", 4)]
  with journal_lib.Journal(
    tmp_path, epochs, tensorboard=False, title="", total=9, done=5
  ) as journal:
    journal.write(line_of("step", 6))
  found = [json.loads(line) for line in path.read_text().splitlines()]
  assert found == [*written[:2], *epochs, line_of("step", 6)]
  journal._path = pathlib.Path("/dev/full")
  with pytest.raises(RunError, match=r"No space left.*full disk"):
    journal.write(line_of("step", 8))


def test_checksum_sees_either_half_of_a_wide_word(x64):
  found = {
    int(checkpoints_lib.checksum({"w": jnp.full(3, value)})[0])
    for value in (0.0, 1.0, 2.0, 1.0 + 2.0**-52)
  }
  assert len(found) == 4


def test_checksum_sees_a_bit_a_swap_and_a_loss_but_no_sharding():
  rng = np.random.default_rng(0)
  tree = {
    "w": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
    "key": jax.random.key(0),
    "n": jnp.int32(3),
  }
  checksum = checkpoints_lib.checksum
  found = checksum(tree)
  assert (found.dtype, found.shape) == (jnp.uint32, (4,))
  for changed in (
    tree["w"].at[3, 2].add(1e-6),
    tree["w"].at[3, 2].set(0),
    tree["w"][::-1],
    tree["w"].at[0, 0].multiply(-1),
  ):
    assert (checksum({**tree, "w": changed}) != found).any()
  sharded = jax.device_put(
    tree["w"], NamedSharding(make_mesh(), PartitionSpec("batch"))
  )
  np.testing.assert_array_equal(checksum({**tree, "w": sharded}), found)


@pytest.fixture(scope="module", name="program")
def fixture_program():
  return program_of(model="mlp", depth=1, width=2)


def save(path, program, epochs=(), seeds=(0,)):
  """A checkpoint of each seed's beginning, as if after so many batches."""
  with contextlib.closing(checkpoints_lib.Checkpoints(path, 7)) as saved:
    saved.epochs += epochs
    for number, seed in enumerate(seeds):
      progress = program.place(program.create(seed))
      batches = progress.batches + number
      saved.save(number, dataclasses.replace(progress, batches=batches))
    saved.wait()


def restore(path, program, seed=7):
  with contextlib.closing(checkpoints_lib.Checkpoints(path, seed)) as opened:
    return opened.restore(program.abstract()), opened.epochs


def test_a_checkpoint_comes_back_with_its_epochs_and_is_of_its_seed(
  program, tmp_path
):
  path, epochs = tmp_path / "run" / "checkpoints", [line_of("epoch", 0)]
  save(path, program, epochs)
  progress, found = restore(path, program)
  assert found == epochs
  expected = program.place(program.create(0)).state.params
  jax.tree.map(np.testing.assert_array_equal, progress.state.params, expected)
  with pytest.raises(RunError, match="it is of seed 7 and batch 0"):
    restore(path, program, seed=8)
  (file,) = (path / "0" / "record").glob("metadata")
  file.write_text(file.read_text().replace("40.0", "90.0"))
  with pytest.raises(RunError, match=r"none of the 1 checkp.*checksum"):
    restore(path, program)


def test_a_checkpoint_of_other_arrays_is_named(program, tmp_path):
  save(tmp_path / "run" / "checkpoints", program)
  other = program_of(model="mlp", depth=2, width=2)
  with pytest.raises(RunError, match=r"none of the .*missing in the check"):
    restore(tmp_path / "run" / "checkpoints", other)


def flip_a_bit(content):
  middle = len(content) // 2
  flipped = bytes([content[middle] ^ 1])
  return content[:middle] + flipped + content[middle + 1 :]


@pytest.mark.parametrize(
  ("name", "damage", "reason"),
  [
    ("progress/array_metadatas/process_0", lambda _: b"", ""),
    ("progress/manifest.ocdbt", lambda _: b"", ""),
    ("progress/_METADATA", lambda x: x[: len(x) // 2], ""),
    ("record/metadata", lambda x: x[: len(x) // 2], ""),
    (
      "progress/ocdbt.process_0/d/*",
      flip_a_bit,
      "its checksum is wrong: a par",
    ),
  ],
)
def test_a_damaged_file_costs_one_checkpoint_which_is_written_again(
  name, damage, reason, program, tmp_path, capsys, monkeypatch
):
  # What Orbax had begun to read is dropped where another part fails.
  monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
  path = tmp_path / "run" / "checkpoints"
  save(path, program, seeds=(0, 1))
  largest = max((path / "1").glob(name), key=lambda x: x.stat().st_size)
  largest.write_bytes(damage(largest.read_bytes()))
  with contextlib.closing(checkpoints_lib.Checkpoints(path, 7)) as opened:
    progress = opened.restore(program.abstract())
    assert int(progress.batches) == 0
    said = capsys.readouterr().err
    assert "checkpoint 1 cannot be read and was moved" in said
    assert reason in said
    opened.save(1, dataclasses.replace(progress, batches=progress.batches + 1))
    opened.wait()
  assert (path.parent / "broken-checkpoint-1").is_dir()
  progress, _ = restore(path, program)
  assert int(progress.batches) == 1
  gc.collect()  # In here, and not in the midst of another test.


@pytest.mark.parametrize(
  ("value", "changes"),
  [(3e38, {}), (0.5, {"learning_rate": 1e38, "skip_nonfinite": False})],
  ids=["all skipped", "not skipped"],
)
def test_an_epoch_that_is_not_finite_ends_the_run(value, changes, tmp_path):
  x = np.full((48, 8, 8, 3), value, np.float32)
  y = np.arange(48, dtype=np.int32) % 2
  images = data.Images("flat", x, y, x, y, 2)
  changes = {**changes, "mean": (0.0,), "standard_deviation": (0.1,)}
  program = program_of(images=images, model="mlp", depth=1, width=2, **changes)
  run = loop.Runner(program, program.lower_step(), program.config.run)
  with pytest.raises(RunError, match="with mean losses that are finite, got"):
    run(images, 1, tmp_path)

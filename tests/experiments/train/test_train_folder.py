"""The folder of a run: who may use it, and what it was begun with."""

import json

import jax
import pytest

from fsam_optax.experiments.train import folder
from fsam_optax.experiments.train.folder import FolderError

CONFIG = {"--rho": 0.2, "--mean": [0.5, 0.5], "--data (SHA-256)": "abc"}


def test_a_link_at_the_lock_is_not_followed(tmp_path):
  precious = tmp_path / "precious"
  precious.write_text("all there is")
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "lock").symlink_to(precious)
  with (
    pytest.raises(FolderError, match=r"lock' must be a file.*a link"),
    folder.lock(tmp_path / "run"),
  ):
    pass
  assert precious.read_text() == "all there is"


def test_what_is_no_file_at_the_lock_is_one_sentence(tmp_path):
  (tmp_path / "lock").mkdir()
  with (
    pytest.raises(FolderError, match="must be a file of this program"),
    folder.lock(tmp_path),
  ):
    pass


def test_whoever_deletes_the_lock_lets_nobody_in(tmp_path):
  with folder.lock(tmp_path):
    (tmp_path / "lock").unlink()
    with (
      pytest.raises(FolderError, match="must not be in use"),
      folder.lock(tmp_path),
    ):
      pass
  with folder.lock(tmp_path):
    assert (tmp_path / "lock").read_text().startswith("process ")


def test_what_others_wrote_steers_no_terminal(tmp_path):
  with folder.lock(tmp_path):
    (tmp_path / "lock").write_text("\x1b[2Jprocess 1")
    with pytest.raises(FolderError) as found, folder.lock(tmp_path):
      pass
  assert "\x1b" not in str(found.value)
  assert r"\x1b[2Jprocess 1" in str(found.value)
  folder.check_config(tmp_path, CONFIG)
  begun = json.loads((tmp_path / "config.json").read_text())
  begun["--data (SHA-256)"] = "\x1b]0;title\x07"
  (tmp_path / "config.json").write_text(json.dumps(begun))
  with pytest.raises(FolderError) as found:
    folder.check_config(tmp_path, CONFIG)
  assert "\x1b" not in str(found.value)


@pytest.mark.parametrize(
  "text",
  ["null", "[]", "3", "{", "[" * 100_000, '"x"', "\x00"],
  ids=["null", "list", "number", "cut", "deep", "string", "zero"],
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, text):
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(FolderError, match="must be the JSON that this program"):
    folder.check_config(tmp_path, CONFIG)


def test_checkpoints_without_their_config_are_not_gone_on_from(tmp_path):
  (tmp_path / "seed-1" / "checkpoints" / "40").mkdir(parents=True)
  with pytest.raises(FolderError, match=r"config.json' must lie beside"):
    folder.check_config(tmp_path, CONFIG)
  assert not (tmp_path / "config.json").exists()


def test_another_generator_of_random_numbers_is_named(tmp_path):
  folder.check_config(tmp_path, CONFIG)
  folder.check_config(tmp_path, CONFIG)
  with (
    jax.default_prng_impl("rbg"),
    pytest.raises(FolderError, match="random numbers threefry2x32, got rbg"),
  ):
    folder.check_config(tmp_path, CONFIG)


def test_versions_that_differ_are_named_and_others_not(tmp_path):
  folder.check_config(tmp_path, CONFIG)
  assert folder.versions_since(tmp_path) == ""
  path = tmp_path / "config.json"
  begun = json.loads(path.read_text())
  begun["versions"]["jax"] = "0.0.1"
  path.write_text(json.dumps(begun))
  assert folder.versions_since(tmp_path) == (
    f"jax 0.0.1 then, {jax.__version__} now"
  )
  folder.check_config(tmp_path, CONFIG)  # A newer JAX may go on.

"""The checkpoints of a run, without a run."""

import json

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import pytest
from small_program import mesh_of
from small_program import program_of

from fsam_optax.experiments.train import checkpoints
from fsam_optax.experiments.train import means
from fsam_optax.experiments.train.checksum import checksum
from fsam_optax.experiments.train.folder import FolderError


def test_checksum_sees_a_bit_a_swap_and_a_loss_but_no_sharding():
  rng = np.random.default_rng(0)
  tree = {
    "w": jnp.asarray(rng.normal(size=(16, 5)), jnp.float32),
    "b": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
    "key": jax.random.key(0),
    "n": jnp.int32(3),
  }
  found = checksum(tree)
  assert found.dtype == jnp.uint32
  assert found.shape == (4,)
  for changed in (
    tree["w"].at[3, 2].add(1e-6),
    tree["w"].at[3, 2].set(0),
    tree["w"][::-1],
    tree["w"].at[0, 0].multiply(-1),
  ):
    assert (checksum({**tree, "w": changed}) != found).any()
  sharded = jax.device_put(
    tree["w"], NamedSharding(mesh_of(8), PartitionSpec("batch"))
  )
  np.testing.assert_array_equal(checksum({**tree, "w": sharded}), found)


@pytest.fixture(scope="module", name="program")
def fixture_program():
  return program_of(mesh_of(1), model="mlp", depth=1, width=2)


def save(folder, program, numbers):
  saved = checkpoints.Checkpoints(folder, pytest.fail)
  saved.save(0, program.place(program.create(0)), numbers)
  saved.wait()
  saved.close()


def restore(folder, program):
  opened = checkpoints.Checkpoints(folder, pytest.fail)
  try:
    return opened.restore(program.abstract())
  finally:
    opened.close()


def test_a_checkpoint_comes_back_whatever_is_reported(program, tmp_path):
  numbers = {"loss": [1 / 3, 3.0], "of another version": [1.0, 2.0]}
  save(tmp_path / "run", program, numbers)
  progress, found = restore(tmp_path / "run", program)
  assert found == numbers
  assert program.sums(found).keys() == set(means.NAMES)
  assert "loss" not in str(jax.tree.structure(program.abstract()))
  expected = program.place(program.create(0)).state.params
  jax.tree.map(np.testing.assert_array_equal, progress.state.params, expected)


def test_numbers_that_were_changed_are_not_believed(program, tmp_path):
  save(tmp_path / "run", program, {"loss": [1.0, 3.0]})
  (file,) = (tmp_path / "run" / "0" / "means").glob("metadata")
  content = json.loads(file.read_text())
  content["means"]["loss"][0] = 2.0
  file.write_text(json.dumps(content))
  with pytest.raises(FolderError, match="none of the 1 checkpoints"):
    restore(tmp_path / "run", program)


def test_a_checkpoint_of_other_arrays_is_named(program, tmp_path):
  save(tmp_path / "run", program, {})
  other = program_of(mesh_of(1), model="mlp", depth=2, width=2)
  with pytest.raises(FolderError, match="holds other arrays than"):
    restore(tmp_path / "run", other)

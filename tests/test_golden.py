"""The trajectories of the authors' PyTorch code, recorded in float64.

Each file of `golden/` carries its configuration, data and batches. The package
must walk the same path through each of its faces.
"""

import json
import pathlib

from faces import FACES
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax

pytestmark = pytest.mark.device

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.json"))


@pytest.fixture(scope="module")
def record(request):
  return json.loads(request.param.read_text())


def loss_of(record):
  def loss_fn(params, batch):
    inputs, targets, labels = batch
    hidden = jnp.tanh(inputs @ params["hidden/kernel"] + params["hidden/bias"])
    outputs = hidden @ params["output/kernel"] + params["output/bias"]
    if record["config"]["task"] == "regression":
      return jnp.mean((outputs - targets) ** 2)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.mean(losses)

  return loss_fn


def start_of(record, dtype):
  params = {
    k: jnp.asarray(v, dtype) for k, v in record["initial_params"].items()
  }
  rows = np.asarray(record["batches"])
  batches = tuple(
    jnp.asarray(np.asarray(record[name])[rows], kind)
    for name, kind in (("inputs", dtype), ("targets", dtype), ("labels", int))
  )
  return params, batches


def base_of(record):
  config = record["config"]
  kwargs = dict(config["base_kwargs"])
  learning_rate, decay = kwargs.pop("lr"), kwargs.pop("weight_decay")
  if config["base"] == "AdamW":
    assert not kwargs
    return optax.adamw(learning_rate, weight_decay=decay)
  assert config["base"] == "SGD"
  return optax.chain(
    optax.add_decayed_weights(decay), optax.sgd(learning_rate, **kwargs)
  )


def remembering(perturbation):
  """The same transformation, with its last output beside its state."""

  def init_fn(params):
    return perturbation.init(params), jax.tree.map(jnp.zeros_like, params)

  def update_fn(updates, state, params=None):
    epsilon, inner = perturbation.update(updates, state[0], params)
    return epsilon, (inner, epsilon)

  return optax.GradientTransformation(init_fn, update_fn)


# Every run by the link, the default by every face, the adaptive by the engine.
WALKS = [
  pytest.param(file, face, id=f"{file.stem}-{face}")
  for file in FILES
  for face in FACES
  if face == "chain"
  or (file.stem, face) == ("adaptive", "train_step")
  or file.stem == "sgd_default"
]


@pytest.mark.parametrize(("record", "face"), WALKS, indirect=["record"])
def test_every_face_walks_the_authors_path(record, face, widest):
  """To 1e-12 in float64; on a device in float32, which strays far less.

  In sixty steps each loses the digits that two gradients have in common and
  hands the rest on to the next: on a CPU, 4e-6 of the largest number of a leaf.
  Any wrong formula moves a run by 1e-3 and more.
  """
  params, batches = start_of(record, widest)
  names = ("rho", "sigma", "lmbda", "adaptive")
  perturbation = remembering(
    fsam_optax.friendly_perturbation(**{k: record["config"][k] for k in names})
  )
  carry, step = FACES[face](
    loss_of(record), params, base_of(record), perturbation
  )

  def seen_step(carry, batch):
    carry, seen = step(carry, batch)
    params, (ascent, perturbation), _ = carry
    return carry, {
      **seen._asdict(),
      "perturbation": perturbation,
      "params_after": params,
      "ema_after": optax.tree.get(ascent, "ema"),
    }

  run = jax.jit(lambda carry: jax.lax.scan(seen_step, carry, batches)[1])
  steps = run(carry)
  if face == "nnx_chain":  # Where the loop sees one loss alone.
    del steps["perturbed_loss"]
  assert len(steps["loss"]) == len(record["batches"])
  for recorded in record["trajectory"]:
    t = recorded["step"]
    for name, values in steps.items():
      expected = recorded[name]
      if not isinstance(expected, dict):
        values, expected = {"": values}, {"": expected}
      assert set(values) == set(expected)
      for key, wanted in expected.items():
        assert values[key].dtype == widest
        tolerance = 1e-12
        if widest != "float64":
          tolerance = 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(
          values[key][t],
          wanted,
          rtol=0,
          atol=tolerance,
          err_msg=f"{t} {name} {key}",
        )


def test_the_six_recorded_runs_are_here():
  assert len(FILES) == 6

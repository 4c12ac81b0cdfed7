"""The trajectories of the authors' PyTorch code, recorded in float64.

Each file of `golden/` carries its configuration, data and batches. The package
must walk the same path to 1e-12 through each of its three doors.
"""

import json
import operator
import pathlib
from typing import NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

FILES = sorted((pathlib.Path(__file__).parent / "golden").glob("*.json"))


class Steps(NamedTuple):
  """What a run saw; the leading axis of every leaf is the step."""

  loss: jax.Array
  perturbed_loss: jax.Array
  perturbation: dict[str, jax.Array]
  params_after: dict[str, jax.Array]
  ema_after: dict[str, jax.Array]


@pytest.fixture(params=FILES, ids=lambda file: file.stem, scope="module")
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


def start_of(record):
  params = {k: jnp.asarray(v) for k, v in record["initial_params"].items()}
  rows = np.asarray(record["batches"])
  batches = tuple(
    jnp.asarray(np.asarray(record[name])[rows])
    for name in ("inputs", "targets", "labels")
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


def hyperparameters_of(record):
  names = ("rho", "sigma", "lmbda", "adaptive")
  return {name: record["config"][name] for name in names}


def ema_of(state):
  is_ema = lambda x: isinstance(x, fsam_optax.SubtractGradientEmaState)
  (found,) = filter(is_ema, jax.tree.leaves(state, is_leaf=is_ema))
  return found.ema


def remembering(perturbation):
  """The same transformation, with its last output beside its state."""

  def init_fn(params):
    return perturbation.init(params), jax.tree.map(jnp.zeros_like, params)

  def update_fn(updates, state, params=None):
    epsilon, inner = perturbation.update(updates, state[0], params)
    return epsilon, (inner, epsilon)

  return optax.GradientTransformation(init_fn, update_fn)


def through_chain(record) -> Steps:
  loss_fn = loss_of(record)
  params, batches = start_of(record)
  tx = optax.chain(
    fsam_optax.fsam(**hyperparameters_of(record)), base_of(record)
  )

  def step(carry, batch):
    params, state = carry
    seen = []

    def grad_fn(perturbed):
      loss, grads = jax.value_and_grad(loss_fn)(perturbed, batch)
      seen.append((perturbed, loss))
      return grads

    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    ((perturbed, perturbed_loss),) = seen
    perturbation = jax.tree.map(jnp.subtract, perturbed, params)
    params = optax.apply_updates(params, updates)
    return (params, state), Steps(
      loss, perturbed_loss, perturbation, params, ema_of(state)
    )

  return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


def through_value_and_grad(record) -> Steps:
  params, batches = start_of(record)
  tx = base_of(record)
  perturbation = remembering(
    fsam_optax.friendly_perturbation(**hyperparameters_of(record))
  )
  fn = fsam_optax.value_and_grad(loss_of(record), perturbation)

  def step(carry, batch):
    params, state, ascent = carry
    loss, grads, ascent, info = fn(params, ascent, batch)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state, ascent), Steps(
      loss, info.perturbed_value, ascent[1], params, ema_of(ascent)
    )

  carry = params, tx.init(params), perturbation.init(params)
  return jax.lax.scan(step, carry, batches)[1]


def through_train_step(record) -> Steps:
  params, batches = start_of(record)
  loss_of_batch = loss_of(record)
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params=params,
    tx=base_of(record),
    perturbation=remembering(
      fsam_optax.friendly_perturbation(**hyperparameters_of(record))
    ),
  )
  train_step = fsam_optax.make_train_step(
    lambda params, model_state, batch, rng: (
      loss_of_batch(params, batch),
      (model_state, {}),
    ),
    jit=False,
  )

  def step(state, batch):
    state, metrics = train_step(state, batch)
    ascent = state.perturbation_state
    return state, Steps(
      metrics["loss"],
      metrics["perturbed_loss"],
      ascent[1],
      state.params,
      ema_of(ascent),
    )

  return jax.lax.scan(step, state, batches)[1]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  "door", [through_chain, through_value_and_grad, through_train_step]
)
def test_every_door_walks_the_authors_path(record, door):
  steps = door(record)
  assert len(steps.loss) == len(record["batches"])
  for recorded in record["trajectory"]:
    t = recorded["step"]
    seen = jax.tree.map(operator.itemgetter(t), steps)._asdict()
    assert seen.keys() | {"step"} == recorded.keys()
    for name, value in seen.items():
      leaves = value if isinstance(value, dict) else {"": value}
      expected = recorded[name]
      expected = expected if isinstance(value, dict) else {"": expected}
      assert leaves.keys() == expected.keys()
      for key, leaf in leaves.items():
        assert leaf.dtype == jnp.float64
        np.testing.assert_allclose(
          leaf, expected[key], rtol=0, atol=1e-12, err_msg=f"{t} {name} {key}"
        )


def test_the_six_recorded_runs_are_here():
  assert [file.stem for file in FILES] == [
    "adamw",
    "adaptive",
    "sgd_cifar100_recipe",
    "sgd_default",
    "sgd_partial_sigma",
    "sigma_zero_is_sam",
  ]


@pytest.mark.usefixtures("x64")
def test_a_wrong_average_leaves_the_authors_path(record):
  """The comparison can fail: the paper's order starts from another average."""
  params, batches = start_of(record)
  loss_fn = loss_of(record)
  perturbation = fsam_optax.friendly_perturbation(
    **hyperparameters_of(record), order="paper"
  )
  batch = jax.tree.map(lambda x: x[0], batches)
  grads = jax.jit(jax.grad(loss_fn))(params, batch)
  _, state = perturbation.update(grads, perturbation.init(params), params)
  expected = record["trajectory"][0]["ema_after"]
  distance = max(
    float(jnp.max(jnp.abs(leaf - jnp.asarray(expected[key]))))
    for key, leaf in ema_of(state).items()
  )
  assert distance > 1e-3

"""Flax's fp8 scales and maxima travel with the weights, and are none."""

from by_hand import flat
from by_hand import unflat
import faces
from faces import state_of
from faces import step_of
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.linen import fp8_ops
from flax.training import dynamic_scale
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
from oracle import FriendlySam
import pytest

import fsam_optax

RHO, LMBDA, LEARNING_RATE = 0.1, 0.6, 0.2
STEPS = 4
OVERWRITTEN = fp8_ops.OVERWRITE_WITH_GRADIENT


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.tanh(nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x))
    return nn.Dense(1, dot_general_cls=nn.Fp8DirectDotGeneralOp)(x)


NETWORK = Network()


def loss_fn(variables, batch):
  x, y = batch
  return jnp.mean((NETWORK.apply(variables, x)[:, 0] - y) ** 2)


grad_fn = jax.jit(jax.grad(loss_fn))


@pytest.fixture(scope="module")
def batches():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return [(draw(16, 16), draw(16)) for _ in range(STEPS)]


@pytest.fixture(scope="module")
def variables(batches):
  """A dict of the collections, with histories of several steps."""
  variables = jax.jit(NETWORK.init)(jax.random.key(0), batches[0][0])
  for batch in batches:
    overwritten = grad_fn(variables, batch)[OVERWRITTEN]
    variables = {**variables, OVERWRITTEN: overwritten}
  return variables


def train_by_hand(variables, batches):
  """F-SAM with SGD over one long vector of the weights alone, in NumPy.

  The scales and maxima are what the gradient at the perturbed weights says.
  """
  ascent = FriendlySam(RHO, 1.0, LMBDA)
  for batch in batches:
    weights = flat(variables["params"])
    gradient = flat(grad_fn(variables, batch)["params"])
    perturbed = weights + ascent(gradient, weights)
    like = variables["params"]
    second = grad_fn({**variables, "params": unflat(perturbed, like)}, batch)
    moved = weights - LEARNING_RATE * flat(second["params"])
    variables = {
      "params": unflat(moved, like),
      OVERWRITTEN: second[OVERWRITTEN],
    }
    yield variables


def perturbation(**kwargs):
  return fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA, **kwargs)


# The train state overwrites by itself; other loops by their optimizer.
SGD = optax.sgd(LEARNING_RATE)
OPTIMIZERS = {
  "params": SGD,
  OVERWRITTEN: optax.stateless(optax.tree.sub),
}
BY_COLLECTION = optax.partition(OPTIMIZERS, {name: name for name in OPTIMIZERS})
LOOPS = [
  (faces.chain, BY_COLLECTION),
  (faces.train_step, SGD),
]


@pytest.mark.parametrize(("face", "tx"), LOOPS, ids=["link", "step"])
def test_a_loop_is_fsam_by_hand_on_the_weights_alone(
  face, tx, variables, batches
):
  carry, step = face(loss_fn, variables, tx, perturbation())
  step, expected = jax.jit(step), None
  for batch, expected in zip(
    batches, train_by_hand(variables, batches), strict=True
  ):
    carry, _ = step(carry, batch)
    found = carry[0]
    assert found.keys() == expected.keys()
    # Far below what the perturbation does, and above what an fp8 product rounds
    # to another number where its input is off in the last bit.
    np.testing.assert_allclose(
      flat(found["params"]), flat(expected["params"]), atol=1e-5
    )
    np.testing.assert_allclose(
      flat(found[OVERWRITTEN]),
      flat(expected[OVERWRITTEN]),
      rtol=1e-4,
      atol=1e-6,
    )
  for name, value in variables.items():  # The scales move, too.
    assert np.abs(flat(expected[name]) - flat(value)).max() > 0


MASKS = {
  "none": None,
  "callable": fsam_optax.masks.by_path("kernel"),
  "prefix": {"params": True, OVERWRITTEN: True},
}


@pytest.mark.parametrize(
  ("name", "container"), [*((x, dict) for x in MASKS), ("none", freeze)]
)
def test_no_mask_moves_or_remembers_what_is_overwritten(
  name, container, variables, batches
):
  ascent = perturbation(mask=MASKS[name])
  grads = grad_fn(variables, batches[0])
  variables, grads = container(variables), container(grads)
  state = ascent.init(variables)
  weights = sum(x.size for x in jax.tree.leaves(variables["params"]))
  kept = sum(x.size for x in jax.tree.leaves(state) if x.ndim)
  assert kept < weights if name == "callable" else kept == weights
  epsilon, _ = ascent.update(grads, state, variables)
  assert jax.tree.structure(epsilon) == jax.tree.structure(variables)
  assert not flat(epsilon[OVERWRITTEN]).any()
  np.testing.assert_allclose(np.linalg.norm(flat(epsilon)), RHO, rtol=1e-5)


def test_networks_side_by_side_have_their_collections_below(variables, batches):
  twice = lambda tree: {"actor": tree, "critic": tree}
  ascent, both = perturbation(), twice(variables)
  grads = twice(grad_fn(variables, batches[0]))
  epsilon, _ = ascent.update(grads, ascent.init(both), both)
  for found in epsilon.values():
    assert not flat(found[OVERWRITTEN]).any()
    norm = np.linalg.norm(flat(found["params"]))
    np.testing.assert_allclose(norm, RHO / 2**0.5, rtol=1e-5)


def test_a_mask_of_nothing_else_is_an_error(variables):
  ascent = perturbation(mask={"params": False, OVERWRITTEN: True})
  with pytest.raises(ValueError, match="must select at least one leaf"):
    ascent.init(variables)


# The maximum over parts and replicas, by an operation of two rows, 1 and 9.


@jax.custom_vjp
def remember(x, largest):
  """The input, and as the gradient of `largest` the largest input."""
  del largest
  return x


remember.defvjp(
  lambda x, largest: (x, x), lambda x, g: (g, jnp.max(jnp.abs(x)))
)
REMEMBERED = {"params": {"w": jnp.array(2.0)}, OVERWRITTEN: {"largest": 0.5}}
TWO_ROWS = jnp.array([1.0, 9.0])


def remembered_loss(variables, x, counts=None):
  x = remember(x, variables[OVERWRITTEN]["largest"])
  count = jnp.sum(jnp.ones_like(x) if counts is None else counts)
  weighed = x if counts is None else x * counts
  return jnp.sum(weighed * variables["params"]["w"]) / count, {"n": count}


def first_gradient(*args, axis=None, **options):
  ascent = perturbation()
  fn = fsam_optax.value_and_grad(
    lambda p, b: remembered_loss(p, *b),
    ascent,
    has_aux=True,
    axis_name=axis,
    **options,
  )
  state = ascent.init(REMEMBERED)
  _, grads, _, info = fn(REMEMBERED, state, args)
  return grads, info.gradient_norm


OPTIONS = {
  "alike": {},
  "lean": {"sync_perturbation": False, "ema_gradient": "descent"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_of_parts_and_replicas_the_largest_is_kept(options):
  in_parts = lambda x: first_gradient(x, num_microbatches=2, **options)
  of_parts = jax.jit(in_parts)(TWO_ROWS)
  of_replicas = jax.jit(
    jax.vmap(
      lambda x: first_gradient(x, axis="b", **options),
      axis_name="b",
      out_axes=None,
    )
  )(TWO_ROWS[:, None])
  for grads, norm in (of_parts, of_replicas):
    assert grads[OVERWRITTEN]["largest"] == 9
    assert grads["params"]["w"] == 5
    assert norm == 5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_the_rows_weigh_does_not_scale_it(options):
  options = {"weight": "n", "num_microbatches": 2, **options}
  grads, _ = first_gradient(TWO_ROWS, jnp.array([0.0, 2.0]), **options)
  assert (grads[OVERWRITTEN]["largest"], grads["params"]["w"]) == (9, 9)
  # Of no rows at all it is what the rows are, and where they are nothing, what
  # it was.
  for row, kept in ((9.0, 9), (jnp.nan, 0.5)):
    x = jnp.full(2, row)
    grads, _ = first_gradient(x, jnp.zeros(2), **options)
    assert (grads[OVERWRITTEN]["largest"], grads["params"]["w"]) == (kept, 0)


@pytest.mark.parametrize("container", [dict, freeze])
def test_a_loss_scale_does_not_divide_it(container):
  scale = dynamic_scale.DynamicScale(scale=2.0**20)
  params = container(jax.tree.map(jnp.asarray, REMEMBERED))
  state = state_of(params, perturbation(), optax.sgd(1.0), dynamic_scale=scale)
  step = step_of(lambda p, b: remembered_loss(p, b)[0], jit=False)
  state, _ = step(state, TWO_ROWS)
  assert state.params[OVERWRITTEN]["largest"] == 9
  np.testing.assert_allclose(state.params["params"]["w"], 2 - 5)


def test_the_link_of_a_chain_keeps_the_largest_of_all_replicas():
  link = fsam_optax.fsam(axis_name="b")

  def updates_of(x):
    grad_fn = jax.grad(lambda p: remembered_loss(p, x)[0])
    return link.update(
      grad_fn(REMEMBERED), link.init(REMEMBERED), REMEMBERED, grad_fn=grad_fn
    )[0]

  updates = jax.vmap(updates_of, axis_name="b", out_axes=None)(
    TWO_ROWS[:, None]
  )
  assert updates[OVERWRITTEN]["largest"] == 9
  assert updates["params"]["w"] == 5


def test_a_perturbation_without_a_mask_leaves_it_too():
  bare = fsam_optax.scale_to_radius(0.5)
  fn = fsam_optax.value_and_grad(
    lambda p, x: jnp.sum(x * p["params"]["w"]) + p[OVERWRITTEN]["largest"] * 7,
    bare,
  )
  loss, _, _, info = fn(REMEMBERED, bare.init(REMEMBERED), TWO_ROWS)
  np.testing.assert_allclose(info.perturbed_value - loss, 0.5 * 10, rtol=1e-6)
  assert info.gradient_norm == 10


def test_in_nnx_the_type_of_a_variable_says_so():
  kind = nnx.variable_type_from_name(OVERWRITTEN, allow_register=True)

  class Model(nnx.Module):
    def __init__(self):
      self.w = nnx.Param(jnp.array(2.0))
      self.largest = kind(jnp.array(0.5))

  def loss(model, x):
    return jnp.mean(remember(x, model.largest[...]) * model.w[...])

  model, wrt = Model(), nnx.Any(nnx.Param, kind)
  optimizer = fsam_optax.nnx.Optimizer(
    model, optax.sgd(0.1), wrt=wrt, perturbation=perturbation()
  )
  _, grads, info = optimizer.value_and_grad(
    loss, num_microbatches=2, return_info=True
  )(model, TWO_ROWS)
  assert (grads.largest[...], grads.w[...]) == (9, 5)
  assert info.gradient_norm == 5
  optimizer.update(model, grads)
  assert model.largest[...] == 9
  np.testing.assert_allclose(model.w[...], 2 - 0.1 * 5)
  with pytest.raises(ValueError, match="`wrt` must leave out what Flax"):
    fsam_optax.nnx.value_and_grad(loss, wrt=wrt)(model, TWO_ROWS)

"""What F-SAM is, law by law; each test is named after the law it checks."""

from by_hand import assert_near
import chex
from faces import FACES
from faces import state_of
from faces import step_of
from faces import train
import jax
from jax import flatten_util
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax
from fsam_optax import friendly_perturbation
from fsam_optax import sam_perturbation

pytestmark = pytest.mark.device

# One operation in float32 rounds by 6e-8; a few of them in a row, sums over
# some thousand elements and the transcendental functions of an accelerator stay
# within some hundred of that.
ROUNDING = 1e-5
# What goes through a difference of gradients, d = g - m, loses the digits that
# these have in common.
CANCELLATION = 1e-4

orders = pytest.mark.parametrize("order", ["official", "paper"])
adaptivities = pytest.mark.parametrize(
  "adaptive", [False, True], ids=["euclidean", "adaptive"]
)


def ascend(perturbation, gradients, params):
  """Perturbations and states of a list of gradients, both lists.

  Not compiled: XLA fuses, and so rounds, each perturbation in its own way.
  """
  state, epsilons, states = perturbation.init(params), [], []
  for gradient in gradients:
    epsilon, state = perturbation.update(gradient, state, params)
    epsilons.append(epsilon)
    states.append(state)
  return epsilons, states


# The ascent.


@orders
@adaptivities
def test_zero_sigma_is_sam(problem, device, order, adaptive):
  gradients = problem.gradients(5)
  found, _ = ascend(
    friendly_perturbation(0.1, sigma=0.0, order=order, adaptive=adaptive),
    gradients,
    problem.params,
  )
  sam = sam_perturbation(0.1, adaptive=adaptive)
  expected, _ = ascend(sam, gradients, problem.params)
  assert_near(found, expected, ROUNDING if device else 0.0)


@orders
def test_perturbation_has_norm_rho(problem, order):
  gradients = problem.gradients(4)
  rho = np.geomspace(1e-4, 100.0, 20, dtype=np.float32)
  sigma = np.linspace(0.0, 0.9, 20, dtype=np.float32)

  @jax.jit
  @jax.vmap
  def norms(rho, sigma):
    perturbation = friendly_perturbation(rho, sigma, order=order)
    epsilons, states = ascend(perturbation, gradients, problem.params)
    reported = [state[1].perturbation_norm for state in states]
    return jnp.stack(list(map(optax.tree.norm, epsilons))), jnp.stack(reported)

  expected = np.broadcast_to(rho[:, None], (20, 4))
  for found in norms(rho, sigma):
    np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_perturbation_of_16_million_weights_has_norm_rho():
  gradient = jnp.sin(jnp.arange(2**24, dtype=jnp.float32))
  perturbation, params = friendly_perturbation(0.1), jnp.zeros(2**24)
  (epsilon,), _ = jax.jit(lambda g: ascend(perturbation, [g], params))(gradient)
  norm = np.linalg.norm(np.asarray(epsilon, np.float64))
  np.testing.assert_allclose(norm, 0.1, rtol=ROUNDING)


@orders
@adaptivities
def test_one_constant_scale_on_all_gradients_changes_nothing(
  problem, order, adaptive
):
  perturbation = friendly_perturbation(
    0.1, sigma=0.7, order=order, adaptive=adaptive
  )
  gradients = problem.gradients(5)
  epsilons, states = ascend(perturbation, gradients, problem.params)
  for scale in (1e-5, 1e8):
    scaled = [optax.tree.scale(scale, gradient) for gradient in gradients]
    again, scaled_states = ascend(perturbation, scaled, problem.params)
    assert_near(again, epsilons, CANCELLATION)
    ema = optax.tree.scale(scale, states[-1][0].ema)
    assert_near(scaled_states[-1][0].ema, ema, ROUNDING)


def test_lmbda_one_freezes_the_ema(problem):
  gradients = problem.gradients(5)
  _, states = ascend(
    friendly_perturbation(lmbda=1.0), gradients, problem.params
  )
  for state in states:
    chex.assert_trees_all_equal(state[0].ema, gradients[0])


@adaptivities
def test_a_tree_equals_its_raveled_vector(problem, adaptive):
  perturbation = friendly_perturbation(0.1, sigma=0.8, adaptive=adaptive)
  gradients, params = problem.gradients(5), problem.params
  ravel = lambda tree: flatten_util.ravel_pytree(tree)[0]
  on_tree, tree_states = ascend(perturbation, gradients, params)
  on_vector, vector_states = ascend(
    perturbation, list(map(ravel, gradients)), ravel(params)
  )
  assert_near(list(map(ravel, on_tree)), on_vector, ROUNDING)
  for state, of_vector in zip(tree_states, vector_states, strict=True):
    assert_near(ravel(state[0].ema), of_vector[0].ema, ROUNDING)


@pytest.mark.parametrize("lmbda", [0.6, 1.0])
def test_both_orders_give_the_same_direction_at_sigma_one(
  problem, widest, lmbda
):
  """From the same average, because g - m = lmbda * (g - m_prev)."""
  params = optax.tree.cast(problem.params, widest)
  gradients = optax.tree.cast(problem.gradients(3), widest)
  tolerance = 1e-12 if widest == "float64" else CANCELLATION
  official = friendly_perturbation(0.1, lmbda=lmbda)
  paper = friendly_perturbation(0.1, lmbda=lmbda, order="paper")
  _, states = ascend(official, gradients[:2], params)
  epsilon, after = official.update(gradients[2], states[-1], params)
  found, paper_after = paper.update(gradients[2], states[-1], params)
  assert_near(found, epsilon, tolerance)
  assert_near(paper_after[0].ema, after[0].ema, tolerance)
  norm, paper_norm = after[1].direction_norm, paper_after[1].direction_norm
  np.testing.assert_allclose(lmbda * norm, paper_norm, rtol=tolerance)


def test_constant_gradients_leave_nothing_to_ascend(problem):
  """At sigma 1 the full gradient goes entirely, not by half."""
  (gradient,) = problem.gradients(1)
  perturbation = friendly_perturbation(0.1)
  epsilons, states = ascend(perturbation, [gradient] * 10, problem.params)
  for epsilon, state in zip(epsilons[1:], states[1:], strict=True):
    chex.assert_trees_all_equal(epsilon, optax.tree.zeros_like(problem.params))
    chex.assert_trees_all_equal(state[0].ema, gradient)
    assert state[1].direction_norm == 0


def test_the_alias_is_the_chain_that_a_reader_can_redo(problem):
  gradients = problem.gradients(4)
  by_hand = optax.chain(
    fsam_optax.subtract_gradient_ema(0.7, 0.8), fsam_optax.scale_to_radius(0.3)
  )
  alias = friendly_perturbation(0.3, 0.7, 0.8)
  chex.assert_trees_all_equal(
    ascend(by_hand, gradients, problem.params),
    ascend(alias, gradients, problem.params),
  )
  by_hand = fsam_optax.sharpness_aware(friendly_perturbation(0.3, 0.7))
  step = lambda link: link.update(
    gradients[0],
    link.init(problem.params),
    problem.params,
    grad_fn=lambda params: params,
  )
  chex.assert_trees_all_equal(step(fsam_optax.fsam(0.3, 0.7)), step(by_hand))


MASKS = {
  "tree": {"hidden": {"kernel": True, "bias": False}, "output": True},
  "prefix": {"hidden": True, "output": False},
  "callable": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}


@pytest.mark.parametrize(
  ("mask", "adaptive", "order"),
  [
    ("tree", True, "paper"),
    ("prefix", False, "official"),
    ("callable", False, "paper"),
  ],
)
def test_a_mask_is_the_perturbation_of_what_it_selects(
  problem, mask, adaptive, order
):
  """Elsewhere: no perturbation, not in the norm, no memory."""
  mask, params = MASKS[mask], problem.params
  kwargs = {"sigma": 0.7, "adaptive": adaptive, "order": order}
  bools = mask(params) if callable(mask) else mask
  bools = jax.tree.leaves(jax.tree.broadcast(bools, params))
  select = lambda tree: [
    x for x, m in zip(jax.tree.leaves(tree), bools, strict=True) if m
  ]
  gradients = problem.gradients(3)
  epsilons, states = ascend(
    friendly_perturbation(0.2, mask=mask, **kwargs), gradients, params
  )
  alone, alone_states = ascend(
    friendly_perturbation(0.2, **kwargs),
    list(map(select, gradients)),
    select(params),
  )
  for t, epsilon in enumerate(epsilons):
    assert_near(select(epsilon), alone[t], ROUNDING)
    assert_near(
      jax.tree.leaves(states[t]), jax.tree.leaves(alone_states[t]), ROUNDING
    )
    moved = [bool(jnp.any(x)) for x in jax.tree.leaves(epsilon)]
    assert moved == bools


# The faces.


def trained(problem, face, tx, perturbation, **options):
  """The parameters after one pass over the batches."""
  carry, _ = train(
    FACES[face],
    problem.loss_fn,
    problem.params,
    problem.batches,
    tx,
    perturbation,
    **options,
  )
  return carry[0]


SGD = optax.sgd(0.05, momentum=0.9)


@pytest.fixture(scope="module")
def plainly(problem):
  """What the base trains alone."""
  return problem.train(optax.with_extra_args_support(SGD))[0]


@pytest.mark.parametrize("face", FACES)
def test_zero_radius_is_the_base_optimizer_bit_for_bit(
  problem, plainly, face, device
):
  # Skipping takes the update in a branch, where XLA rounds it differently.
  options = {"skip_nonfinite": False} if face == "train_step" else {}
  found = trained(problem, face, SGD, friendly_perturbation(0.0), **options)
  # Two programs may round differently, and on a device they do.
  assert_near(found, plainly, ROUNDING if device else 0.0)


def test_zero_radius_hands_the_base_the_same_bits(problem):
  """On any device, where both loops call one compiled gradient."""
  link, params = fsam_optax.fsam(rho=0.0), problem.params
  grad_fn, state = jax.jit(jax.grad(problem.loss_fn)), link.init(params)
  for t in range(4):
    at = lambda params, t=t: grad_fn(params, problem.batch(t))
    updates, state = link.update(at(params), state, params, grad_fn=at)
    chex.assert_trees_all_equal(updates, at(params))


OPTIONS = {
  "each alone": {"num_microbatches": 4, "sync_perturbation": False, "every": 2},
  "a half": {
    "ascent_fraction": 0.5,
    "ema_gradient": "descent",
    "start": 1,
    "stop": 2,
  },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_mean_the_same_in_every_face(problem, options):
  few = problem._replace(batches=jax.tree.map(lambda x: x[:3], problem.batches))
  perturbation = friendly_perturbation(0.1, lmbda=0.6)
  expected, *others = (
    trained(few, face, SGD, perturbation, **options)
    for face in ("value_and_grad", "train_step", "nnx_optimizer")
  )
  for found in others:
    assert_near(found, expected, CANCELLATION)


def test_an_eighth_of_the_rows_gives_the_direction(problem):
  """The first of every eight."""
  step = step_of(problem.loss_fn, ascent_fraction=1 / 8)
  batch = problem.batch(0)
  part = jax.tree.map(lambda x: x[::8], batch)
  _, metrics = step(state_of(problem.params, friendly_perturbation(0.1)), batch)
  loss, gradient = jax.value_and_grad(problem.loss_fn)(problem.params, part)
  (epsilon,), _ = ascend(friendly_perturbation(0.1), [gradient], problem.params)
  perturbed = optax.apply_updates(problem.params, epsilon)
  expected = loss, problem.loss_fn(perturbed, batch)
  found = metrics["loss"], metrics["perturbed_loss"]
  np.testing.assert_allclose(found, expected, rtol=ROUNDING)


def test_eight_devices_equal_one(problem):
  """A batch spread over a mesh, as jit alone does it."""
  if jax.device_count() < 8:
    pytest.skip("There are fewer than eight devices.")
  rows = jax.NamedSharding(make_mesh(data=8), jax.P(None, "data"))
  spread = problem._replace(batches=jax.device_put(problem.batches, rows))
  assert len(spread.batches[0].sharding.device_set) == 8
  found, expected = (
    trained(x, "chain", SGD, friendly_perturbation(0.1))
    for x in (spread, problem)
  )
  assert_near(found, expected, CANCELLATION)

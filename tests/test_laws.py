"""What F-SAM is, law by law; each test is named after the law it checks."""

import chex
import jax
from jax import flatten_util
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax

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


def train(problem, tx, *, sharpness_aware=True):
  """The parameters after one pass over the batches."""

  def step(carry, batch):
    params, state = carry
    grad_fn = lambda p: jax.grad(problem.loss_fn)(p, batch)
    extra = {"grad_fn": grad_fn} if sharpness_aware else {}
    updates, state = tx.update(grad_fn(params), state, params, **extra)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit
  def run(params):
    return jax.lax.scan(step, (params, tx.init(params)), problem.batches)[0]

  return run(problem.params)[0]


@orders
@adaptivities
def test_zero_sigma_is_sam(problem, order, adaptive):
  gradients = problem.gradients(5)
  friendly = fsam_optax.friendly_perturbation(
    0.1, sigma=0.0, order=order, adaptive=adaptive
  )
  sam = fsam_optax.sam_perturbation(0.1, adaptive=adaptive)
  chex.assert_trees_all_equal(
    ascend(friendly, gradients, problem.params)[0],
    ascend(sam, gradients, problem.params)[0],
  )


def test_zero_sigma_trains_as_optax_contrib_sam(problem):
  base = lambda: optax.sgd(0.05, momentum=0.9)
  ours = optax.chain(fsam_optax.fsam(rho=0.1, sigma=0.0), base())
  theirs = optax.contrib.sam(
    base(),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.1)),
    sync_period=2,
    opaque_mode=True,
    reset_state=False,
  )
  state = theirs.init(problem.params)
  params = problem.params

  @jax.jit
  def step(params, state, batch):
    grad_fn = lambda p, _=None: jax.grad(problem.loss_fn)(p, batch)
    updates, state = theirs.update(
      grad_fn(params), state, params, grad_fn=grad_fn
    )
    return optax.apply_updates(params, updates), state

  for t in range(len(problem.batches[0])):
    params, state = step(params, state, problem.batch(t))
  chex.assert_trees_all_close(train(problem, ours), params, rtol=1e-4)


BASES = {
  "sgd": optax.sgd(0.05, momentum=0.9, nesterov=True),
  "adamw": optax.adamw(0.01),
  "clipped": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1)),
}


@pytest.mark.parametrize("base", BASES)
def test_zero_radius_is_the_base_optimizer_bit_for_bit(problem, base):
  base = BASES[base]
  tx = optax.chain(fsam_optax.fsam(rho=0.0), base)
  chex.assert_trees_all_equal(
    train(problem, tx), train(problem, base, sharpness_aware=False)
  )


def test_zero_radius_is_value_and_grad_bit_for_bit(problem):
  perturbation = fsam_optax.friendly_perturbation(rho=0.0)
  fn = jax.jit(fsam_optax.value_and_grad(problem.loss_fn, perturbation))
  plain = jax.jit(jax.value_and_grad(problem.loss_fn))
  state = perturbation.init(problem.params)
  for t in range(3):
    batch = problem.batch(t)
    value, grads, state, info = fn(problem.params, state, batch)
    chex.assert_trees_all_equal((value, grads), plain(problem.params, batch))
    assert info.perturbed_value == value
    assert info.perturbation_norm == 0


@orders
def test_perturbation_has_norm_rho(problem, order):
  gradients = problem.gradients(4)
  rho = np.geomspace(1e-4, 100.0, 20, dtype=np.float32)
  sigma = np.linspace(0.0, 0.9, 20, dtype=np.float32)

  @jax.jit
  @jax.vmap
  def norms(rho, sigma):
    perturbation = fsam_optax.friendly_perturbation(rho, sigma, order=order)
    epsilons, states = ascend(perturbation, gradients, problem.params)
    reported = [state[1].perturbation_norm for state in states]
    return jnp.stack(list(map(optax.tree.norm, epsilons))), jnp.stack(reported)

  measured, reported = norms(rho, sigma)
  expected = np.broadcast_to(rho[:, None], (20, 4))
  np.testing.assert_allclose(measured, expected, rtol=1e-5)
  np.testing.assert_allclose(reported, expected, rtol=1e-5)


def test_adaptive_perturbation_has_norm_rho_relative_to_the_weights(problem):
  perturbation = fsam_optax.friendly_perturbation(0.3, adaptive=True)
  epsilons, _ = ascend(perturbation, problem.gradients(4), problem.params)
  for epsilon in epsilons:
    relative = jax.tree.map(jnp.divide, epsilon, problem.params)
    np.testing.assert_allclose(optax.tree.norm(relative), 0.3, rtol=1e-5)


@orders
@adaptivities
def test_one_constant_scale_on_all_gradients_changes_nothing(
  problem, order, adaptive
):
  perturbation = fsam_optax.friendly_perturbation(
    0.1, sigma=0.7, order=order, adaptive=adaptive
  )
  gradients = problem.gradients(5)
  epsilons, states = ascend(perturbation, gradients, problem.params)
  for scale in (2.0**-10, 3.0, 2.0**10):
    scaled = [optax.tree.scale(scale, gradient) for gradient in gradients]
    again, scaled_states = ascend(perturbation, scaled, problem.params)
    chex.assert_trees_all_close(again, epsilons, rtol=1e-4, atol=1e-7)
    chex.assert_trees_all_close(
      scaled_states[-1][0].ema,
      optax.tree.scale(scale, states[-1][0].ema),
      rtol=1e-5,
      atol=1e-6 * scale,
    )


def test_the_opposite_gradients_give_the_opposite_perturbations(problem):
  perturbation = fsam_optax.friendly_perturbation(0.1)
  gradients = problem.gradients(4)
  opposite = [optax.tree.scale(-1.0, gradient) for gradient in gradients]
  epsilons, _ = ascend(perturbation, gradients, problem.params)
  chex.assert_trees_all_equal(
    ascend(perturbation, opposite, problem.params)[0],
    [optax.tree.scale(-1.0, epsilon) for epsilon in epsilons],
  )


def test_lmbda_one_freezes_the_ema(problem):
  perturbation = fsam_optax.friendly_perturbation(lmbda=1.0)
  gradients = problem.gradients(5)
  _, states = ascend(perturbation, gradients, problem.params)
  for state in states:
    chex.assert_trees_all_equal(state[0].ema, gradients[0])


def test_lmbda_one_in_paper_order_is_sam(problem):
  gradients = problem.gradients(5)
  friendly = fsam_optax.friendly_perturbation(lmbda=1.0, order="paper")
  epsilons, states = ascend(friendly, gradients, problem.params)
  sam, _ = ascend(fsam_optax.sam_perturbation(), gradients, problem.params)
  chex.assert_trees_all_close(epsilons, sam, rtol=1e-6)
  chex.assert_trees_all_equal(
    states[-1][0].ema, optax.tree.zeros_like(problem.params)
  )


@orders
def test_lmbda_zero_remembers_the_last_gradient_alone(problem, order):
  perturbation = fsam_optax.friendly_perturbation(
    sigma=0.5, lmbda=0.0, order=order
  )
  gradients = problem.gradients(5)
  _, states = ascend(perturbation, gradients, problem.params)
  for state, gradient in zip(states, gradients, strict=True):
    chex.assert_trees_all_close(state[0].ema, gradient, rtol=1e-6, atol=1e-6)


def test_lmbda_zero_ascends_along_the_change_of_the_gradient(problem):
  perturbation = fsam_optax.friendly_perturbation(0.1, lmbda=0.0)
  gradients = problem.gradients(3)
  epsilons, _ = ascend(perturbation, gradients, problem.params)
  change = optax.tree.sub(gradients[2], gradients[1])
  expected = optax.tree.scale(0.1 / optax.tree.norm(change), change)
  chex.assert_trees_all_close(epsilons[2], expected, rtol=1e-4, atol=1e-7)


def test_the_first_step_is_sam_whatever_sigma(problem):
  gradients = problem.gradients(1)
  sam, _ = ascend(fsam_optax.sam_perturbation(), gradients, problem.params)
  for sigma in (0.3, 1.0, 2.0):
    friendly = fsam_optax.friendly_perturbation(sigma=sigma)
    epsilons, states = ascend(friendly, gradients, problem.params)
    chex.assert_trees_all_close(epsilons, sam, rtol=1e-6)
    chex.assert_trees_all_equal(states[0][0].ema, gradients[0])


def test_a_tree_equals_its_raveled_vector(problem):
  perturbation = fsam_optax.friendly_perturbation(0.1, sigma=0.8)
  gradients = problem.gradients(5)
  ravel = lambda tree: flatten_util.ravel_pytree(tree)[0]
  on_tree, tree_states = ascend(perturbation, gradients, problem.params)
  on_vector, vector_states = ascend(
    perturbation, list(map(ravel, gradients)), ravel(problem.params)
  )
  for t in range(5):
    chex.assert_trees_all_close(
      (ravel(on_tree[t]), ravel(tree_states[t][0].ema)),
      (on_vector[t], vector_states[t][0].ema),
      rtol=1e-5,
      atol=1e-7,
    )


def test_rotated_gradients_give_rotated_perturbations(problem):
  """No coordinate is special where the perturbation is not adaptive."""
  rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))
  rotate = lambda tree: rotation.astype(np.float32) @ tree["kernel"].ravel()
  gradients = [gradient["hidden"] for gradient in problem.gradients(4)]
  params = problem.params["hidden"]
  only_kernel = [{"kernel": gradient["kernel"]} for gradient in gradients]
  perturbation = fsam_optax.friendly_perturbation(0.1)
  epsilons, _ = ascend(perturbation, only_kernel, {"kernel": params["kernel"]})
  rotated, _ = ascend(
    perturbation, list(map(rotate, gradients)), rotate(params)
  )
  chex.assert_trees_all_close(
    rotated, list(map(rotate, epsilons)), rtol=1e-4, atol=1e-6
  )


def test_rescaled_weights_give_rescaled_adaptive_perturbations(problem):
  """The law of ASAM: only the size relative to the weight counts."""
  perturbation = fsam_optax.friendly_perturbation(0.3, adaptive=True)
  factors = jax.tree.map(
    lambda x: jnp.linspace(0.5, 4.0, x.size).reshape(x.shape), problem.params
  )
  times = lambda tree: jax.tree.map(jnp.multiply, tree, factors)
  over = lambda tree: jax.tree.map(jnp.divide, tree, factors)
  gradients = problem.gradients(4)
  epsilons, _ = ascend(perturbation, gradients, problem.params)
  rescaled, _ = ascend(
    perturbation, list(map(over, gradients)), times(problem.params)
  )
  chex.assert_trees_all_close(
    rescaled, list(map(times, epsilons)), rtol=1e-4, atol=1e-6
  )


@pytest.mark.usefixtures("x64")
def test_both_orders_give_the_same_direction_at_sigma_one(problem):
  """From the same average, because g - m = lmbda * (g - m_prev)."""
  gradients = optax.tree.cast(problem.gradients(3), jnp.float64)
  params = optax.tree.cast(problem.params, jnp.float64)
  official = fsam_optax.friendly_perturbation(0.1, lmbda=0.6)
  paper = fsam_optax.friendly_perturbation(0.1, lmbda=0.6, order="paper")
  _, states = ascend(official, gradients[:2], params)
  state = states[-1]
  epsilon, after = official.update(gradients[2], state, params)
  in_paper_order, paper_after = paper.update(gradients[2], state, params)
  chex.assert_trees_all_close(epsilon, in_paper_order, rtol=0, atol=1e-14)
  chex.assert_trees_all_close(
    after[0].ema, paper_after[0].ema, rtol=0, atol=1e-14
  )
  np.testing.assert_allclose(
    0.6 * after[1].direction_norm, paper_after[1].direction_norm
  )


@pytest.mark.usefixtures("x64")
def test_the_averages_of_both_orders_differ_by_the_faded_first_gradient(
  problem,
):
  gradients = optax.tree.cast(problem.gradients(5), jnp.float64)
  params = optax.tree.cast(problem.params, jnp.float64)
  official = fsam_optax.friendly_perturbation(lmbda=0.6)
  paper = fsam_optax.friendly_perturbation(lmbda=0.6, order="paper")
  _, states = ascend(official, gradients, params)
  _, paper_states = ascend(paper, gradients, params)
  for t in range(5):
    difference = optax.tree.sub(states[t][0].ema, paper_states[t][0].ema)
    chex.assert_trees_all_close(
      difference,
      optax.tree.scale(0.6 ** (t + 1), gradients[0]),
      rtol=0,
      atol=1e-13,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0, 1.5])
def test_the_ema_averages_the_raw_gradients(problem, sigma):
  """Not the subtracted ones; so it does not depend on sigma at all."""
  gradients = optax.tree.cast(problem.gradients(6), jnp.float64)
  params = optax.tree.cast(problem.params, jnp.float64)
  perturbation = fsam_optax.friendly_perturbation(sigma=sigma, lmbda=0.7)
  _, states = ascend(perturbation, gradients, params)
  weights = [0.7**5] + [0.3 * 0.7 ** (5 - t) for t in range(1, 6)]
  expected = jax.tree.map(
    lambda *g: sum(w * x for w, x in zip(weights, g, strict=True)), *gradients
  )
  chex.assert_trees_all_close(states[-1][0].ema, expected, rtol=0, atol=1e-13)


def test_constant_gradients_leave_nothing_to_ascend(problem):
  """At sigma 1 the full gradient goes entirely, not by half."""
  (gradient,) = problem.gradients(1)
  perturbation = fsam_optax.friendly_perturbation(0.1)
  epsilons, states = ascend(perturbation, [gradient] * 10, problem.params)
  for epsilon, state in zip(epsilons[1:], states[1:], strict=True):
    chex.assert_trees_all_equal(epsilon, optax.tree.zeros_like(problem.params))
    chex.assert_trees_all_equal(state[0].ema, gradient)
    assert state[1].direction_norm == 0


def test_the_base_optimizer_never_sees_the_clean_gradient(problem):
  seen = []

  def update_fn(updates, state, params=None):
    del params
    seen.append(updates)
    return updates, state

  spy = optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)
  perturbation = fsam_optax.friendly_perturbation(0.5)
  tx = optax.chain(fsam_optax.fsam(0.5), spy)
  params, batch = problem.params, problem.batch(0)
  grad_fn = jax.jit(lambda p: jax.grad(problem.loss_fn)(p, batch))
  gradient = grad_fn(params)
  tx.update(gradient, tx.init(params), params, grad_fn=grad_fn)
  epsilon, _ = perturbation.update(gradient, perturbation.init(params), params)
  expected = grad_fn(optax.apply_updates(params, epsilon))
  chex.assert_trees_all_equal(seen, [expected])
  assert optax.tree.norm(optax.tree.sub(expected, gradient)) > 0.1


def test_a_linear_loss_rises_by_rho_times_its_gradient():
  slope = jnp.array([3.0, -4.0, 12.0])
  fn = fsam_optax.value_and_grad(
    lambda w, batch: jnp.vdot(batch, w), fsam_optax.sam_perturbation(0.1)
  )
  perturbation = fsam_optax.sam_perturbation(0.1)
  params = jnp.ones(3)
  loss, grads, _, info = fn(params, perturbation.init(params), slope)
  np.testing.assert_allclose(info.perturbed_value - loss, 0.1 * 13, rtol=1e-5)
  np.testing.assert_array_equal(grads, slope)


def test_the_average_does_not_depend_on_the_radius(problem):
  gradients = problem.gradients(4)
  at = lambda rho: ascend(
    fsam_optax.friendly_perturbation(rho), gradients, problem.params
  )[1][-1][0]
  chex.assert_trees_all_equal(at(0.0), at(0.05), at(7.0))


def test_schedules_at_a_constant_are_the_constant(problem):
  constant = optax.chain(fsam_optax.fsam(0.1, 0.9, 0.8), optax.sgd(0.05))
  scheduled = optax.chain(
    fsam_optax.fsam(*map(optax.constant_schedule, (0.1, 0.9, 0.8))),
    optax.sgd(0.05),
  )
  chex.assert_trees_all_close(
    train(problem, constant), train(problem, scheduled), rtol=1e-5, atol=1e-6
  )


def test_schedules_count_the_updates(problem):
  rhos = [0.1, 0.0, 0.4, 0.2]
  perturbation = fsam_optax.sam_perturbation(
    lambda count: jnp.asarray(rhos)[count]
  )
  epsilons, states = ascend(perturbation, problem.gradients(4), problem.params)
  norms = [float(optax.tree.norm(epsilon)) for epsilon in epsilons]
  np.testing.assert_allclose(norms, rhos, rtol=1e-5)
  assert [int(state.count) for state in states] == [1, 2, 3, 4]


def test_the_alias_is_the_chain_that_a_reader_can_redo(problem):
  gradients = problem.gradients(4)
  by_hand = optax.chain(
    fsam_optax.subtract_gradient_ema(0.7, 0.8), fsam_optax.scale_to_radius(0.3)
  )
  alias = fsam_optax.friendly_perturbation(0.3, 0.7, 0.8)
  chex.assert_trees_all_equal(
    ascend(by_hand, gradients, problem.params),
    ascend(alias, gradients, problem.params),
  )
  chex.assert_trees_all_equal(
    train(problem, optax.chain(fsam_optax.fsam(0.3, 0.7), optax.sgd(0.1))),
    train(
      problem,
      optax.chain(
        fsam_optax.sharpness_aware(fsam_optax.friendly_perturbation(0.3, 0.7)),
        optax.sgd(0.1),
      ),
    ),
  )


def test_eight_devices_equal_one(problem):
  """A batch spread over a mesh, as jit alone does it."""
  tx = optax.chain(fsam_optax.fsam(0.1), optax.sgd(0.05, momentum=0.9))
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P(None, "data"))
  spread = problem._replace(batches=jax.device_put(problem.batches, rows))
  assert len(spread.batches[0].sharding.device_set) == 8
  chex.assert_trees_all_close(
    train(spread, tx), train(problem, tx), rtol=1e-4, atol=1e-5
  )


MASKS = {
  "tree": {"hidden": {"kernel": True, "bias": False}, "output": True},
  "prefix": {"hidden": True, "output": False},
  "callable": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS)
@adaptivities
@orders
def test_a_mask_is_the_perturbation_of_what_it_selects(
  problem, mask, adaptive, order
):
  """Elsewhere: no perturbation, not in the norm, no memory."""
  mask, params = MASKS[mask], problem.params
  kwargs = {"sigma": 0.7, "adaptive": adaptive, "order": order}
  bools = mask(params) if callable(mask) else mask
  bools = jax.tree.broadcast(bools, params)
  select = lambda tree: [
    x
    for x, is_selected in zip(
      jax.tree.leaves(tree), jax.tree.leaves(bools), strict=True
    )
    if is_selected
  ]
  gradients = problem.gradients(3)
  epsilons, states = ascend(
    fsam_optax.friendly_perturbation(0.2, mask=mask, **kwargs),
    gradients,
    params,
  )
  alone, alone_states = ascend(
    fsam_optax.friendly_perturbation(0.2, **kwargs),
    list(map(select, gradients)),
    select(params),
  )
  assert 0 < len(select(params)) < len(jax.tree.leaves(params))
  for t, epsilon in enumerate(epsilons):
    chex.assert_trees_all_close(select(epsilon), alone[t], rtol=1e-5)
    chex.assert_trees_all_close(
      jax.tree.leaves(states[t]), jax.tree.leaves(alone_states[t]), rtol=1e-5
    )
    for x, is_selected in zip(
      jax.tree.leaves(epsilon), jax.tree.leaves(bools), strict=True
    ):
      assert bool(jnp.any(x)) == is_selected

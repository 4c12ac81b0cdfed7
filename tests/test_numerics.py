"""Zero, NaN, infinite, tiny and huge gradients, in every floating dtype."""

import functools

import chex
from faces import FACES
from faces import state_of
from faces import step_of
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax


def tree(dtype, kernel, bias):
  return {
    "kernel": jnp.asarray(kernel, dtype),
    "bias": jnp.asarray(bias, dtype),
  }


def parameters(dtype):
  return tree(dtype, [[1.0, -2.0], [0.5, 3.0]], [0.25, -1.0])


def gradients(dtype):
  """Two, with numbers that every dtype holds exactly."""
  return (
    tree(dtype, [[1.0, 2.0], [-1.0, 0.5]], [2.0, -0.5]),
    tree(dtype, [[0.5, -1.0], [1.5, 2.0]], [1.0, 0.25]),
  )


# Factories that return the same object for the same arguments, and so share
# their compiled updates between tests.
friendly_perturbation = functools.cache(fsam_optax.friendly_perturbation)
compiled_update = functools.cache(
  lambda perturbation: jax.jit(perturbation.update)
)


def run(perturbation, updates, params):
  """Perturbations and states, compiled, because XLA may reorder."""
  update = compiled_update(perturbation)
  state, outputs = perturbation.init(params), []
  for gradient in updates:
    epsilon, state = update(gradient, state, params)
    outputs.append((epsilon, state))
  return outputs


@pytest.fixture(params=["official", "paper"])
def ascent(request, dtype):
  """Two for each dtype: of dtype, order and metric they have every pair."""
  is_adaptive = (request.param == "paper") == (dtype in ("float16", "float32"))
  return friendly_perturbation(
    0.1, 0.5, 0.75, order=request.param, adaptive=is_adaptive
  )


@pytest.mark.device
def test_a_zero_gradient_is_no_perturbation(dtype, ascent):
  params = parameters(dtype)
  zeros = optax.tree.zeros_like(params)
  ((epsilon, state),) = run(ascent, [zeros], params)
  chex.assert_trees_all_equal((epsilon, state[0].ema), (zeros, zeros))
  assert state[0].count == 1
  assert state[1].direction_norm == 0
  assert state[1].perturbation_norm == 0


def test_zero_eps_divides_nothing_by_zero():
  tx = fsam_optax.scale_to_radius(0.1, eps=0.0)
  for direction in (jnp.zeros(2), jnp.array([3.0, 4.0])):
    epsilon, state = tx.update(direction, tx.init(direction))
    chex.assert_tree_all_finite((epsilon, state))
  np.testing.assert_allclose(epsilon, [0.06, 0.08], rtol=1e-6)


def poisoned(gradient, value):
  return {**gradient, "bias": gradient["bias"].at[1].set(value)}


def huge(dtype):
  """Finite, but its norm is not in the dtype of the norm (float32 at least)."""
  wide = jnp.promote_types(dtype, jnp.float32)
  return float(jnp.finfo(wide).max) / 4


@pytest.mark.device
@pytest.mark.parametrize(
  "value_of", [lambda _: np.nan, lambda _: -np.inf, huge]
)
def test_a_gradient_that_is_not_finite_never_enters_the_average(
  dtype, ascent, value_of
):
  """Nor one of finite entries whose norm overflows, as the first or later."""
  params, both = parameters(dtype), gradients(dtype)
  clean = run(ascent, both, params)
  bad = [poisoned(gradient, value_of(dtype)) for gradient in both]
  outputs = run(ascent, [bad[0], both[0], bad[1], both[1]], params)
  average = ascent.init(params)[0]
  for t in range(2):
    (epsilon, during), (after_epsilon, after) = outputs[2 * t : 2 * t + 2]
    chex.assert_trees_all_equal(epsilon, optax.tree.zeros_like(params))
    # To a weight of -0.0, 0.0 is a change.
    assert all(jnp.signbit(x).all() for x in jax.tree.leaves(epsilon))
    chex.assert_trees_all_equal(during[0], average)
    assert not np.isfinite(during[1].direction_norm)
    assert during[1].perturbation_norm == 0
    # The next finite step is what it would have been.
    expected, (average, _) = clean[t]
    chex.assert_trees_all_equal((after_epsilon, after[0]), (expected, average))
    chex.assert_tree_all_finite(after)


@pytest.mark.parametrize("size", [60000.0, 2.0**-20], ids=["huge", "tiny"])
def test_norms_of_float16_go_beyond_its_range(size):
  """There squares overflow at 256 and vanish at 2 ** -13: not in float32."""
  params = parameters("float16")
  gradient = tree("float16", np.full((2, 2), size), [size, -size])
  perturbation = friendly_perturbation(0.5)
  ((epsilon, state),) = run(perturbation, [gradient], params)
  wide = np.float64(gradient["bias"][0])
  np.testing.assert_allclose(
    state[1].direction_norm, wide * np.sqrt(6), rtol=1e-6
  )
  np.testing.assert_allclose(
    np.float64(epsilon["bias"]),
    0.5 / np.sqrt(6) * np.array([1, -1]),
    rtol=2 * float(jnp.finfo("float16").eps),
  )
  chex.assert_trees_all_equal(state[0].ema, gradient)


@pytest.mark.parametrize(
  ("sigma", "counts"), [(1.0, [1, 1, 2]), (0.0, [1, 2, 3])]
)
def test_a_direction_that_overflows_float16_is_treated_as_not_finite(
  sigma, counts
):
  """The gradients are finite in float16, and their difference is not.

  Without a direction along it, the average takes it in, and stays finite.
  """
  params = parameters("float16")
  extreme = jax.tree.map(lambda x: jnp.full_like(x, 65504), params)
  opposite = jax.tree.map(jnp.negative, extreme)
  perturbation = friendly_perturbation(0.1, sigma)
  outputs = run(perturbation, [extreme, opposite, extreme], params)
  for epsilon, state in outputs:
    chex.assert_tree_all_finite((epsilon, state[0]))
  assert [int(state[0].count) for _, state in outputs] == counts


def test_a_wide_gradient_never_makes_a_narrow_average_infinite():
  """Finite in float32, infinite if cast to float16, and then for ever."""
  params = parameters("float32")
  perturbation = friendly_perturbation(
    0.1, lmbda=0.5, accumulator_dtype=jnp.float16
  )
  large = jax.tree.map(lambda x: jnp.full_like(x, -1e6), params)
  outputs = run(perturbation, [large, params], params)
  chex.assert_tree_all_finite(outputs)
  limit = jax.tree.map(lambda x: jnp.full_like(x, -65504, jnp.float16), params)
  chex.assert_trees_all_equal(outputs[0][1][0].ema, limit)


@pytest.mark.parametrize(
  ("order", "accumulator"),
  [("official", None), ("paper", "bfloat16"), ("official", "float32")],
)
def test_the_average_keeps_its_dtype(dtype, order, accumulator):
  params = parameters(dtype)
  perturbation = fsam_optax.friendly_perturbation(
    # Strong types, as inject_hyperparams passes them.
    jnp.float32(0.1),
    jnp.float32(0.9),
    jnp.float32(0.8),
    order=order,
    accumulator_dtype=accumulator,
  )
  state = perturbation.init(params)
  expected = dtype if accumulator is None else jnp.dtype(accumulator)
  epsilon, updated = jax.eval_shape(perturbation.update, params, state, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updated, state)
  chex.assert_trees_all_equal_shapes_and_dtypes(epsilon, params)
  assert {x.dtype for x in jax.tree.leaves(updated[0].ema)} == {expected}


@pytest.mark.parametrize(
  "accumulator", ["int32", "uint8", bool, "complex64", jnp.float8_e4m3fn]
)
def test_a_dtype_that_holds_no_average_is_refused(accumulator):
  name = jnp.dtype(accumulator).name
  with pytest.raises(ValueError, match=f"_dtype` must be a .*got {name}"):
    fsam_optax.fsam(accumulator_dtype=accumulator)


def test_a_dtype_that_was_taken_for_a_schedule_is_refused():
  make = optax.inject_hyperparams(fsam_optax.fsam)
  with pytest.raises(ValueError, match=r"got an array\. Under .*static_args"):
    make(accumulator_dtype=jnp.bfloat16).init(jnp.ones(2))


def test_the_average_of_complex_parameters_is_complex():
  params = jnp.array([1 + 2j, 3j], jnp.complex64)
  perturbation = friendly_perturbation(accumulator_dtype="bfloat16")
  ((_, state),) = run(perturbation, [params], params)
  np.testing.assert_array_equal(state[0].ema, params)


def test_norms_are_float32_at_least(dtype):
  params = parameters(dtype)
  wide = jnp.promote_types(dtype, jnp.float32)
  perturbation = friendly_perturbation(0.1)
  fn = fsam_optax.value_and_grad(
    lambda p, b: sum(jnp.sum(x * x) for x in jax.tree.leaves(p)), perturbation
  )
  loss, grads, state, info = jax.eval_shape(
    fn, params, perturbation.init(params), None
  )
  assert state[1].direction_norm.dtype == wide
  assert state[1].perturbation_norm.dtype == wide
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  assert loss.dtype == info.perturbed_value.dtype == dtype
  for name in info._fields[1:]:
    assert getattr(info, name).dtype == wide, name
    assert getattr(info, name).shape == ()


@pytest.mark.parametrize("narrow", [False, True])
def test_parameters_of_mixed_dtypes_keep_each_their_own(narrow):
  """Whatever the dtype of the gradients."""
  params = {
    "a": jnp.ones(2, jnp.bfloat16),
    "b": jnp.ones(2, jnp.float32),
    "c": jnp.ones(2, jnp.float16),
  }
  gradient = optax.tree.cast(params, jnp.bfloat16) if narrow else params
  perturbation = friendly_perturbation(0.6)
  ((epsilon, state),) = run(perturbation, [gradient], params)
  chex.assert_trees_all_equal_shapes_and_dtypes(epsilon, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state[0].ema, params)
  np.testing.assert_allclose(
    np.float32(epsilon["b"]), 0.6 / np.sqrt(6), rtol=1e-6
  )
  np.testing.assert_allclose(np.float32(epsilon["a"]), 0.245, rtol=1e-2)


def test_a_float32_average_keeps_what_bfloat16_forgets():
  """0.999 of bfloat16 plus a thousandth rounds back to where it was."""
  params = jnp.ones(4, jnp.bfloat16)
  updates = [jnp.ones(4, jnp.bfloat16)] + [jnp.full(4, 2.0, jnp.bfloat16)] * 20
  tx = fsam_optax.subtract_gradient_ema(
    lmbda=0.999, accumulator_dtype=jnp.float32
  )
  _, state = run(tx, updates, params)[-1]
  np.testing.assert_allclose(state.ema, 2 - 0.999**20, rtol=1e-5)


@pytest.mark.parametrize(
  ("order", "adaptive"), [("official", False), ("paper", True)]
)
def test_complex_parameters_are_as_real_ones_turned(order, adaptive):
  """Turn every entry of the plane by its own angle: nothing else changes."""
  rng = np.random.default_rng(0)
  phase = np.exp(1j * rng.uniform(0, 2 * np.pi, size=5)).astype(np.complex64)
  params, *updates = rng.normal(size=(4, 5)).astype(np.float32)
  perturbation = friendly_perturbation(
    0.1, 0.8, 0.7, order=order, adaptive=adaptive
  )
  on_reals = run(perturbation, updates, params)
  turned = run(perturbation, [phase * g for g in updates], phase * params)
  for (epsilon, state), (expected, expected_state) in zip(
    turned, on_reals, strict=True
  ):
    chex.assert_trees_all_close(epsilon, phase * expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
      state[0].ema, phase * expected_state[0].ema, rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_close(state[1], expected_state[1], rtol=1e-5)
    assert state[1].direction_norm.dtype == jnp.float32


@pytest.mark.parametrize("face", FACES)
def test_complex_gradients_are_those_of_jax_in_every_face(face):
  """And the ascent goes up: along the conjugate, which the average holds."""
  z = jnp.array([1 + 2j, -3 + 0.5j], jnp.complex64)
  options = {"checked": True} if face == "chain" else {}
  carry, step = FACES[face](
    lambda params, b: jnp.sum(jnp.abs(params["z"] - b) ** 2),
    {"z": z},
    optax.sgd(1.0),
    friendly_perturbation(0.3),
    **options,
  )
  (params, (average, _), _), _ = jax.jit(step)(carry, jnp.full(2, 1j))
  away = np.asarray(z) - 1j
  perturbed = away + 0.3 * away / np.linalg.norm(away)
  np.testing.assert_allclose(z - params["z"], 2 * np.conj(perturbed), rtol=1e-5)
  np.testing.assert_allclose(average.ema["z"], 2 * away, rtol=1e-5)


def test_large_leaves_can_be_mapped_and_differentiated():
  """The sum holds under the transformations of jax."""
  x = np.random.default_rng(0).normal(size=(2, 256, 260)).astype(np.float32)
  x[:, 7] = 0.0  # A dead unit: its row has a sum at which a root is steep.
  perturbation = fsam_optax.sam_perturbation(0.1)

  def norm(x):
    _, state = perturbation.update(x, perturbation.init(x), x)
    return state.direction_norm

  np.testing.assert_allclose(
    jax.jit(jax.vmap(norm))(x),
    np.linalg.norm(x.reshape(2, -1), axis=1),
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    jax.jit(jax.grad(norm))(x[0]), x[0] / np.linalg.norm(x[0]), rtol=1e-4
  )


@pytest.mark.parametrize("turn", [1, 1j])
def test_second_derivatives_of_the_norm_at_zeros(turn):
  """Of a matrix with a row of zeros, and of a complex zero."""
  perturbation = fsam_optax.scale_to_radius(1.0)
  state = perturbation.init(jnp.zeros((2, 2)))

  def norm(x):
    x = jnp.reshape(x, (2, 2)) * turn
    return perturbation.update(x, state)[1].direction_norm

  x = jnp.array([3.0, 4.0, 0.0, 0.0])
  # By hand: (1 - u u^T) / ||x||, with the unit vector u along x.
  expected = (np.eye(4) - np.outer(x, x) / 25) / 5
  np.testing.assert_allclose(jax.hessian(norm)(x), expected, atol=1e-6)


@pytest.mark.parametrize("params", [{}, {"empty": jnp.zeros((0, 3))}], ids=str)
def test_nothing_to_perturb_is_no_error(params):
  tx = fsam_optax.fsam(0.1)
  updates, state = tx.update(
    params, tx.init(params), params, grad_fn=lambda _: params
  )
  chex.assert_trees_all_equal(updates, params)
  chex.assert_tree_all_finite(state)


def test_the_state_does_not_alias_the_parameters():
  params = parameters("float32")
  pointers = lambda t: {x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)}
  state = fsam_optax.fsam().init(params)
  assert not pointers(state) & pointers(params)


def test_the_counters_stop_at_their_end_instead_of_wrapping():
  perturbation = friendly_perturbation(0.1)
  params, (first, _) = parameters("float32"), gradients("float32")
  state = perturbation.init(params)
  last = jnp.asarray(jnp.iinfo(jnp.int32).max)
  state = tuple(part._replace(count=last) for part in state)
  _, state = perturbation.update(first, state, params)
  assert [int(part.count) for part in state] == [int(last)] * 2


# Derivatives through steps, as learned hyperparameters take them.


def test_slopes_of_hyperparameters_pass_through_a_step_that_does_nothing():
  """As if that step had not been taken: skipped, or of a zero gradient."""
  target = jnp.eye(4, 3)
  loss_fn = lambda params, batch: jnp.mean((batch @ params["w"] - 1) ** 2)

  def final_loss(hyperparameters, batches):
    learning_rate, rho = hyperparameters
    # Without a memory, in which the zero gradient would be one.
    ascent = fsam_optax.sam_perturbation(rho=rho)
    params = {"w": jnp.array([1.0, 2.0, 3.0])}
    state = state_of(params, ascent, optax.sgd(learning_rate))
    step = step_of(loss_fn, jit=False)
    for batch in batches:
      state, _ = step(state, batch)
    return loss_fn(state.params, target)

  slope = jax.jit(jax.grad(final_loss))
  expected = slope((0.1, 0.05), [target])
  assert abs(expected[1]) > 1e-3
  for value in (np.nan, np.inf, 0.0):
    found = slope((0.1, 0.05), [jnp.full((4, 3), value), target])
    np.testing.assert_allclose(found, expected, rtol=1e-5)

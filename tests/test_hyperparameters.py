"""Hyperparameters are checked where they are values, and the error names them.

A tracer or a schedule has no value yet: it passes.
"""

import functools
import math

import chex
import jax
from jax import numpy as jnp
import numpy as np
import pytest

import fsam_optax

# The factories that check, which the others call, and each hyperparameter.
SLOTS = [
  (fsam_optax.subtract_gradient_ema, "sigma"),
  (fsam_optax.subtract_gradient_ema, "lmbda"),
  (fsam_optax.scale_to_radius, "rho"),
  (functools.partial(fsam_optax.scale_to_radius, 0.1), "eps"),
]
slots = pytest.mark.parametrize(
  ("factory", "name"), SLOTS, ids=[name for _, name in SLOTS]
)

# What is refused: the error, its message behind the name, and the values.
REFUSED = [
  (
    ValueError,
    r"must be (in \[0, 1\]|non-negative), got -",
    [-0.1, -1, np.float32(-0.5), np.array(-2.0), -1e-30, jnp.asarray(-1.0)],
  ),
  (
    ValueError,
    "must be finite, got (nan|-?inf)",
    [math.nan, math.inf, -math.inf, np.array(np.inf), jnp.asarray(jnp.nan)],
  ),
  (
    TypeError,
    "must be a real number",
    [
      *("0.1", b"0.1", None, True, False, 1 + 0j, np.True_, np.complex64(1)),
      *({}, {"rho": 0.1}, Ellipsis, [None], ["a", "b"], [0.1], (0.1, 0.2)),
      *([[0.1], [0.2, 0.3]], jnp.asarray(True), jnp.asarray(1j)),
    ],
  ),
  (
    ValueError,
    r"must be a real .*got an array of shape \(",
    [np.ones(1), np.zeros((2, 2)), np.zeros(0), np.array([0.1]), jnp.ones(3)],
  ),
]
TAKEN = [
  *(0, 1, 0.0, 1.0, -0.0, 0.5, 5e-324, np.float16(0.5), np.float32(1)),
  *(np.int64(1), np.uint8(0), np.array(0.25), jnp.asarray(0.5)),
  *map(functools.partial(jnp.ones, ()), ("bfloat16", "int32", "uint8")),
]


@slots
@pytest.mark.parametrize(("error", "message", "values"), REFUSED)
def test_a_value_that_is_no_hyperparameter_is_refused(
  factory, name, error, message, values
):
  for value in values:
    with pytest.raises(error, match=f"^`{name}` {message}"):
      factory(**{name: value})


@slots
def test_edge_values_and_scalars_of_numpy_and_jax_pass(factory, name):
  for value in TAKEN:
    assert jax.tree.leaves(factory(**{name: value}).init(jnp.ones(2)))


def test_a_decay_alone_must_not_be_above_one():
  fsam_optax.fsam(rho=1e6, sigma=1e6)
  with pytest.raises(ValueError, match=r"^`lmbda` must be in \[0, 1\], got"):
    fsam_optax.fsam(lmbda=np.nextafter(1.0, 2.0))


@slots
def test_schedules_pass_and_are_called_at_update_only(factory, name):
  counts = []
  schedule = lambda count: (counts.append(count), 0.5)[1]
  if name == "eps":
    with pytest.raises(TypeError, match="`eps` must be a real number, got"):
      factory(eps=schedule)
    return
  tx = factory(**{name: schedule})
  state = tx.init(jnp.ones(2))
  assert not counts
  for _ in range(2):
    _, state = tx.update(jnp.ones(2), state)
  assert [int(count) for count in counts] == [0, 1]


@slots
def test_tracers_pass(factory, name):
  build = jax.jit(lambda value: factory(**{name: value}).init(jnp.ones(2)))
  # Out of range, but nobody can know while it is traced.
  assert jax.tree.leaves(build(0.5))
  assert jax.tree.leaves(build(-0.5))
  assert build._cache_size() == 1


@slots
def test_arrays_pass_where_a_program_is_traced(factory, name):
  """As JAX traces even the comparison of two numbers there."""
  half = jnp.float32(0.5)
  given = [half] if name == "eps" else [half, lambda count: half]

  def update(x):
    made = [factory(**{name: value}) for value in given]
    return [tx.update(x, tx.init(x))[0] for tx in made]

  chex.assert_tree_all_finite(jax.jit(update)(jnp.ones(2)))


@pytest.mark.parametrize(("name", "end"), [("rho", 0.0), ("lmbda", 1.0)])
def test_derivatives_at_the_ends_of_the_range_are_those_beside_them(name, end):
  def moved(number):
    tx = fsam_optax.friendly_perturbation(**{"rho": 0.1, name: number})
    given = jnp.array([1.0, 2.0]), jnp.array([2.0, -1.0])
    state = tx.init(given[0])
    for gradient in given:
      epsilon, state = tx.update(gradient, state)
    return epsilon[0]

  beside = end + (1e-3 if end == 0 else -1e-3)
  at_end, near = (jax.jit(jax.grad(moved))(x) for x in (end, beside))
  np.testing.assert_allclose(at_end, near, rtol=0.02)


@pytest.mark.parametrize(
  ("name", "value", "instead"),
  [
    ("rho", -0.1, 0.0),
    ("rho", math.nan, 0.0),
    ("rho", math.inf, 0.0),
    ("sigma", -1.0, 0.0),
    ("lmbda", 1.5, 1.0),
    ("lmbda", math.nan, 0.0),
  ],
)
def test_a_schedule_that_leaves_the_range_is_refused_or_brought_back(
  name, value, instead
):
  """Refused where the value is known, and no worse than that compiled."""

  def directions(number):
    tx = fsam_optax.friendly_perturbation(**{name: number})
    state = tx.init(jnp.zeros(2))
    for gradient in (jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])):
      found, state = tx.update(gradient, state)
    return found, state

  late = lambda count: jnp.where(count > 0, value, 0.5)
  with pytest.raises(ValueError, match=f"`{name}` must be"):
    directions(late)
  found = jax.jit(lambda: directions(late))()
  expected = directions(lambda count: instead if count else 0.5)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected
  )


def test_the_radius_follows_the_learning_rate_between_its_ends():
  rho = fsam_optax.radius_schedule(
    lambda t: 0.1 * t,
    rho_min=0.1,
    rho_max=0.3,
    learning_rate_min=0.2,
    learning_rate_max=0.4,
  )
  found = [rho(t) for t in (0, 2, 3, 4, 9)]
  np.testing.assert_allclose(found, [0.1, 0.1, 0.2, 0.3, 0.3], rtol=1e-6)
  peaks = jnp.array([0.1, 0.2])
  of_peak = lambda peak: fsam_optax.radius_schedule(
    lambda t: peak / 2, 0.1, 0.3, learning_rate_max=peak
  )(0)
  np.testing.assert_allclose(jax.vmap(of_peak)(peaks), [0.2, 0.2], rtol=1e-6)
  peak = jnp.float32(0.2)
  np.testing.assert_allclose(jax.jit(lambda: of_peak(peak))(), 0.2, rtol=1e-6)

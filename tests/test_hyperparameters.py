"""Hyperparameters are checked where they are values, and the error names them.

A tracer or a schedule has no value yet: it passes.
"""

import math

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

# Each factory as a function of one hyperparameter by keyword.
FACTORIES = {
  "subtract_gradient_ema": (
    fsam_optax.subtract_gradient_ema,
    ("sigma", "lmbda"),
  ),
  "scale_to_radius": (
    lambda rho=0.1, **kwargs: fsam_optax.scale_to_radius(rho, **kwargs),
    ("rho", "eps"),
  ),
  "friendly_perturbation": (
    fsam_optax.friendly_perturbation,
    ("rho", "sigma", "lmbda"),
  ),
  "sam_perturbation": (fsam_optax.sam_perturbation, ("rho",)),
  "fsam": (fsam_optax.fsam, ("rho", "sigma", "lmbda")),
}
SLOTS = [
  pytest.param(factory, name, id=f"{factory_name}-{name}")
  for factory_name, (factory, names) in FACTORIES.items()
  for name in names
]
slots = pytest.mark.parametrize(("factory", "name"), SLOTS)
scheduled_slots = pytest.mark.parametrize(
  ("factory", "name"), [slot for slot in SLOTS if slot.values[1] != "eps"]
)


@slots
@pytest.mark.parametrize(
  "value",
  [-0.1, -1, np.float32(-0.5), np.array(-2.0), -1e-30],
  ids=repr,
)
def test_negative_values_are_refused(factory, name, value):
  must = r"must be in \[0, 1\]" if name == "lmbda" else "must be non-negative"
  with pytest.raises(ValueError, match=f"^`{name}` {must}, got -"):
    factory(**{name: value})


@slots
@pytest.mark.parametrize(
  "value",
  [math.nan, math.inf, -math.inf, np.float64("nan"), np.array(np.inf)],
  ids=repr,
)
def test_values_that_are_not_finite_are_refused(factory, name, value):
  with pytest.raises(
    ValueError, match=f"^`{name}` must be finite, got (nan|-?inf)"
  ):
    factory(**{name: value})


@slots
@pytest.mark.parametrize(
  "value",
  [
    "0.1",
    b"0.1",
    None,
    True,
    False,
    1 + 0j,
    np.True_,
    np.complex64(1),
    {},
    {"rho": 0.1},
    Ellipsis,
    [None],
    ["a", "b"],
    [0.1],
    (0.1, 0.2),
    [[0.1], [0.2, 0.3]],
  ],
  ids=repr,
)
def test_values_of_another_type_are_refused(factory, name, value):
  with pytest.raises(TypeError, match=f"^`{name}` must be a real number"):
    factory(**{name: value})


@slots
@pytest.mark.parametrize(
  "value",
  [np.ones(1), np.zeros((2, 2)), np.zeros(0), np.array([0.1, 0.2])],
  ids=repr,
)
def test_arrays_that_are_not_scalars_are_refused(factory, name, value):
  with pytest.raises(
    ValueError, match=rf"^`{name}` must be a real .*got an array of shape \("
  ):
    factory(**{name: value})


@slots
def test_jax_arrays_are_checked_as_values(factory, name):
  factory(**{name: jnp.asarray(0.5)})
  with pytest.raises(ValueError, match=f"^`{name}` must be finite, got nan"):
    factory(**{name: jnp.asarray(jnp.nan)})
  with pytest.raises(ValueError, match=f"^`{name}` must be .*got an array"):
    factory(**{name: jnp.ones(3)})
  with pytest.raises(ValueError, match=rf"^`{name}` must be .*got -1\.0\."):
    factory(**{name: jnp.asarray(-1.0)})
  with pytest.raises(TypeError, match=f"^`{name}` must be a real number"):
    factory(**{name: jnp.asarray(True)})
  with pytest.raises(TypeError, match=f"^`{name}` must be a real number"):
    factory(**{name: jnp.asarray(1j)})


@pytest.mark.parametrize("factory", ["subtract_gradient_ema", "fsam"])
@pytest.mark.parametrize("value", [1.0001, 2, np.nextafter(1.0, 2.0)])
def test_a_decay_above_one_is_refused(factory, value):
  factory, _ = FACTORIES[factory]
  with pytest.raises(ValueError, match=r"^`lmbda` must be in \[0, 1\], got"):
    factory(lmbda=value)


@pytest.mark.parametrize(
  "factory",
  [
    fsam_optax.fsam,
    fsam_optax.friendly_perturbation,
    fsam_optax.subtract_gradient_ema,
  ],
)
@pytest.mark.parametrize(
  "order", ["Official", "", None, 1, ["paper"]], ids=repr
)
def test_an_unknown_order_is_refused(factory, order):
  with pytest.raises(
    ValueError, match=r"^`order` must be 'official' or 'paper', got"
  ):
    factory(order=order)


@slots
@pytest.mark.parametrize(
  "value",
  [
    0,
    1,
    0.0,
    1.0,
    -0.0,
    0.5,
    5e-324,
    np.float16(0.5),
    np.float32(1),
    np.int64(1),
    np.uint8(0),
    np.array(0.25),
  ],
  ids=repr,
)
def test_edge_values_and_scalars_of_numpy_pass(factory, name, value):
  params = jnp.ones(2)
  tx = factory(**{name: value})
  assert jax.tree.leaves(tx.init(params))


@slots
@pytest.mark.parametrize(
  "dtype", ["bfloat16", "float16", "float32", "int32", "uint8"]
)
def test_scalars_of_jax_pass(factory, name, dtype):
  tx = factory(**{name: jnp.ones([], dtype)})
  assert isinstance(tx, optax.GradientTransformation)


@pytest.mark.parametrize("name", ["rho", "sigma"])
def test_a_large_radius_or_share_passes(name):
  assert fsam_optax.fsam(**{name: 1e6}).init(jnp.ones(1)) is not None


@scheduled_slots
def test_schedules_pass_and_are_called_at_update_only(factory, name):
  counts = []
  schedule = lambda count: (counts.append(count), 0.5)[1]
  tx = factory(**{name: schedule})
  state = tx.init(jnp.ones(2))
  assert not counts
  extra = {"grad_fn": lambda p: p} if factory is fsam_optax.fsam else {}
  for _ in range(2):
    _, state = tx.update(jnp.ones(2), state, jnp.ones(2), **extra)
  assert [int(count) for count in counts] == [0, 1]


def test_eps_is_no_schedule():
  with pytest.raises(TypeError, match="`eps` must be a real number, got"):
    fsam_optax.scale_to_radius(0.1, eps=lambda count: 1e-12)


@slots
def test_tracers_pass(factory, name):
  @jax.jit
  def build(value):
    tx = factory(**{name: value})
    return tx.init(jnp.ones(2))

  # Out of range, but nobody can know while it is traced.
  assert jax.tree.leaves(build(0.5))
  assert jax.tree.leaves(build(-0.5))
  assert build._cache_size() == 1


def test_hyperparameters_can_be_mapped_over_and_differentiated():
  gradient, params = jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])

  def norm_of(rho):
    tx = fsam_optax.friendly_perturbation(rho)
    epsilon, _ = tx.update(gradient, tx.init(params), params)
    return jnp.linalg.norm(epsilon)

  rhos = jnp.array([0.1, 0.2, 0.4])
  np.testing.assert_allclose(jax.vmap(norm_of)(rhos), rhos, rtol=1e-6)
  np.testing.assert_allclose(jax.grad(norm_of)(0.3), 1.0, rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_adaptive_needs_the_parameters(adaptive):
  tx = fsam_optax.scale_to_radius(0.1, adaptive=adaptive)
  direction = jnp.array([3.0, 4.0])
  if adaptive:
    with pytest.raises(ValueError, match="`params` must be given when `adapt"):
      tx.update(direction, tx.init(direction))
  else:
    epsilon, _ = tx.update(direction, tx.init(direction))
    np.testing.assert_allclose(epsilon, [0.06, 0.08], rtol=1e-6)


def test_no_factory_swallows_a_misspelt_hyperparameter():
  for factory, _ in FACTORIES.values():
    with pytest.raises(
      TypeError, match="unexpected keyword argument 'lambda_'"
    ):
      factory(lambda_=0.9)


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

  def late(count):
    return jnp.where(count > 0, value, 0.5)

  with pytest.raises(ValueError, match=f"`{name}` must be"):
    directions(late)
  found = jax.jit(lambda: directions(late))()
  expected = directions(lambda count: instead if count else 0.5)
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(one, other, rtol=1e-6)

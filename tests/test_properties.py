"""The laws over many trees, dtypes, hyperparameters and scales."""

import hypothesis
from hypothesis import strategies as st
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax

# Few shapes, so that few programs are compiled; any tree of them.
SHAPES = st.sampled_from([(), (1,), (3,), (2, 3)])
DTYPES = st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16])
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 3e-2, jnp.float16: 4e-3}
SETTINGS = hypothesis.settings(
  max_examples=25,
  deadline=None,
  derandomize=True,
  suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
UNIT = st.floats(0.0, 1.0)
RADIUS = st.floats(1e-3, 10.0)


@st.composite
def trees(draw, dtypes=DTYPES):
  """A tree of shapes, some leaves None, and its dtype."""
  dtype = draw(dtypes)
  leaf = st.one_of(SHAPES, st.none())
  tree = draw(
    st.recursive(
      SHAPES.map(lambda shape: {"leaf": shape}),
      lambda child: st.one_of(
        st.tuples(child, leaf), st.fixed_dictionaries({"a": child, "b": leaf})
      ),
      max_leaves=3,
    )
  )
  seed = draw(st.integers(0, 2**31 - 1))
  return tree, dtype, np.random.default_rng(seed)


def is_shape(x):
  return isinstance(x, tuple) and all(isinstance(n, int) for n in x)


def sample(tree, dtype, rng, scale=1.0):
  return jax.tree.map(
    lambda shape: jnp.asarray(scale * rng.standard_normal(shape), dtype),
    tree,
    is_leaf=is_shape,
  )


def run(perturbation, gradients, params):
  """The perturbation after a sequence of gradients."""
  state = perturbation.init(params)
  for gradient in gradients:
    epsilon, state = perturbation.update(gradient, state, params)
  return epsilon, state


def assert_close(a, b, tolerance):
  """Raises unless two trees agree, relative to the largest element."""
  largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(b))
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x, np.float32),
      np.asarray(y, np.float32),
      rtol=0,
      atol=tolerance * largest + 1e-30,
    ),
    a,
    b,
  )


@SETTINGS
@hypothesis.given(trees(), RADIUS, UNIT, UNIT)
def test_the_perturbation_has_norm_rho_and_the_dtype_of_params(
  case, rho, sigma, lmbda
):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(2)]
  epsilon, state = run(
    fsam_optax.friendly_perturbation(rho, sigma, lmbda), gradients, params
  )
  norm = float(optax.tree.norm(optax.tree.cast(epsilon, jnp.float32)))
  np.testing.assert_allclose(norm, rho, rtol=TOLERANCE[dtype])
  np.testing.assert_allclose(state[1].perturbation_norm, rho, rtol=1e-5)
  assert {x.dtype for x in jax.tree.leaves(epsilon)} == {jnp.dtype(dtype)}
  assert jax.tree.structure(epsilon) == jax.tree.structure(params)


@SETTINGS
@hypothesis.given(trees(), RADIUS, UNIT)
def test_sigma_0_is_sam(case, rho, lmbda):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(2)]
  friendly = fsam_optax.friendly_perturbation(rho, 0.0, lmbda)
  jax.tree.map(
    np.testing.assert_array_equal,
    run(friendly, gradients, params)[0],
    run(fsam_optax.sam_perturbation(rho), gradients, params)[0],
  )


@SETTINGS
@hypothesis.given(trees(st.just(jnp.float32)), UNIT, UNIT, st.floats(1e-5, 1e8))
def test_one_scale_on_all_gradients_changes_nothing(case, sigma, lmbda, scale):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(3)]
  scaled = [jax.tree.map(lambda g: g * scale, g) for g in gradients]
  perturbation = fsam_optax.friendly_perturbation(0.1, sigma, lmbda)
  assert_close(
    run(perturbation, scaled, params)[0],
    run(perturbation, gradients, params)[0],
    1e-4,
  )


@SETTINGS
@hypothesis.given(trees(st.just(jnp.float32)), UNIT, UNIT, st.booleans())
def test_a_tree_equals_its_raveled_vector(case, sigma, lmbda, adaptive):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(2)]
  perturbation = fsam_optax.friendly_perturbation(
    0.1, sigma, lmbda, adaptive=adaptive
  )
  ravel = lambda tree: jnp.concatenate(
    [x.ravel() for x in jax.tree.leaves(tree)]
  )
  flat, _ = run(perturbation, [ravel(g) for g in gradients], ravel(params))
  assert_close(ravel(run(perturbation, gradients, params)[0]), flat, 1e-5)


@SETTINGS
@hypothesis.given(trees(st.just(jnp.float32)), st.floats(0.1, 1.0))
def test_both_orders_point_the_same_way_at_sigma_1(case, lmbda):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(3)]
  directions = []
  for order in ("official", "paper"):
    tx = fsam_optax.subtract_gradient_ema(1.0, lmbda, order=order)
    # From one average: the orders start theirs differently.
    state = tx.init(params)._replace(count=jnp.int32(1), ema=gradients[0])
    direction, state = tx.update(gradients[1], state)
    directions.append((direction, state.ema))
  (official, ema), (paper, paper_ema) = directions
  assert_close(paper_ema, ema, 1e-5)
  assert_close(paper, jax.tree.map(lambda d: lmbda * d, official), 1e-4)


@SETTINGS
@hypothesis.given(trees(), UNIT)
def test_lmbda_1_freezes_the_average(case, sigma):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(3)]
  perturbation = fsam_optax.friendly_perturbation(0.1, sigma, 1.0)
  _, state = run(perturbation, gradients, params)
  jax.tree.map(np.testing.assert_array_equal, state[0].ema, gradients[0])


@SETTINGS
@hypothesis.given(
  trees(), st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 2)
)
def test_a_gradient_that_is_not_finite_leaves_no_trace(case, bad, at):
  tree, dtype, rng = case
  params = sample(tree, dtype, rng)
  gradients = [sample(tree, dtype, rng) for _ in range(2)]
  perturbation = fsam_optax.friendly_perturbation(0.1, 1.0, 0.9)
  poisoned = jax.tree.map(lambda g: jnp.full_like(g, bad), gradients[0])
  with_bad = [*gradients[:at], poisoned, *gradients[at:]]
  _, clean = run(perturbation, gradients, params)
  _, state = run(perturbation, with_bad, params)
  jax.tree.map(np.testing.assert_array_equal, state[0], clean[0])
  epsilon, _ = run(perturbation, [*gradients, poisoned], params)
  assert all(float(jnp.abs(e).max()) == 0 for e in jax.tree.leaves(epsilon))

"""bfloat16 compute, float16 with a dynamic loss scale, a bfloat16 average."""

from by_hand import bits
from faces import state_of
from faces import step_of
from flax.training.dynamic_scale import DynamicScale
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax


def half_loss(params, batch):
  w = params["w"].astype(jnp.float16)
  residual = batch["x"].astype(jnp.float16) @ w - batch["y"].astype(jnp.float16)
  return jnp.mean(residual**2)


def half_state(scale):
  return state_of(
    {"w": jnp.full(3, 0.5)},
    fsam_optax.friendly_perturbation(rho=0.1, lmbda=0.5),
    optax.sgd(0.1, momentum=0.9),
    dynamic_scale=scale,
  )


@pytest.fixture(scope="module")
def batch():
  x = jax.random.normal(jax.random.key(0), (8, 3))
  return {"x": x, "y": x.sum(axis=1)}


@pytest.fixture(scope="module")
def step():
  return step_of(half_loss)


def test_a_finite_streak_raises_the_scale_by_flax_rule(step, batch):
  state = half_state(DynamicScale(scale=2.0**4, growth_interval=3))
  scales = []
  for _ in range(5):
    state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 0
    scales.append(float(state.dynamic_scale.scale))
  assert scales == [16.0, 16.0, 16.0, 32.0, 32.0]


def test_a_changing_scale_does_not_show_in_the_average(step, batch):
  averages = []
  growing = [DynamicScale(scale=2.0**n, growth_interval=3) for n in (3, 9)]
  for scale in (None, *growing):
    state = half_state(scale)
    for _ in range(6):
      state, _ = step(state, batch)
    averages.append(np.array(state.perturbation_state[0].ema["w"]))
  for average in averages[1:]:
    np.testing.assert_allclose(average, averages[0], rtol=2e-2)


@pytest.mark.parametrize("weight", [20.0, 15.9], ids=["first", "second"])
def test_an_overflow_in_either_pass_lowers_the_scale_and_moves_nothing_else(
  weight,
):
  """2 ** 16 is not in float16: it is the square of 16 times 256."""

  def loss_fn(params, batch):
    w = params["w"].astype(jnp.float16)
    return jnp.sum(w * w * jnp.float16(256.0))

  state = state_of(
    {"w": jnp.array([weight])},
    fsam_optax.sam_perturbation(rho=0.5),
    optax.sgd(0.1, momentum=0.9),
    dynamic_scale=DynamicScale(scale=1.0),
  )
  before = bits((state.step, state.params, state.opt_state))
  state, metrics = step_of(loss_fn)(state, jnp.zeros(1))
  assert np.isfinite(metrics["loss"]) == (weight < 16)
  assert not np.isfinite(metrics["perturbed_loss"])
  assert int(metrics["skipped"]) == 1
  assert float(state.dynamic_scale.scale) == 0.5
  assert bits((state.step, state.params, state.opt_state)) == before


@pytest.mark.parametrize("sync", [True, False])
def test_a_mean_that_overflows_leaves_the_average_as_it_was(sync):
  """Four gradients of 3e4 have a sum that is not in float16."""
  perturbation = fsam_optax.friendly_perturbation(
    0.1, accumulator_dtype=jnp.float32
  )
  fn = fsam_optax.value_and_grad(
    lambda w, slope: jnp.sum(w * slope),
    perturbation,
    axis_name="batch",
    sync_perturbation=sync,
  )
  mapped = jax.vmap(
    fn, in_axes=(None, None, 0), out_axes=None, axis_name="batch"
  )
  w = jnp.ones(3, jnp.float16)
  state, slopes = perturbation.init(w), jnp.full((4, 3), 3e4, jnp.float16)
  for expected in (0.0, 3e3):
    *_, state, _ = mapped(w, state, slopes)
    np.testing.assert_allclose(state[0].ema, np.full(3, expected), rtol=1e-3)
    slopes /= 10


def test_a_scale_without_skipping_is_refused(batch):
  step = step_of(half_loss, skip_nonfinite=False)
  with pytest.raises(ValueError, match="`skip_nonfinite` must be True"):
    step(half_state(DynamicScale()), batch)


friendly = fsam_optax.friendly_perturbation


@pytest.mark.parametrize(
  ("perturbation", "options"),
  [
    (friendly(0.1, accumulator_dtype=jnp.bfloat16), {}),
    (friendly(0.1), {"weight": "rows", "every": 2}),
    (friendly(0.1), {"num_microbatches": 2, "sync_perturbation": False}),
    (friendly(0.1, average="optimizer"), {}),
    (optax.inject_hyperparams(friendly)(0.1), {}),
  ],
  ids=["narrow average", "gate", "parts", "momentum", "injected"],
)
def test_strict_promotion_is_no_hindrance(perturbation, options):
  """The numbers are those of the standard promotion, also in bfloat16."""
  params = {"w": jnp.ones(3, jnp.bfloat16)}
  trace = optax.trace(0.9).init(params)

  def loss_fn(params, rows):
    loss = jnp.sum((params["w"] * rows) ** 2)
    return loss.astype(jnp.float32), {"rows": jnp.float32(2)}

  passes = fsam_optax.value_and_grad(
    loss_fn, perturbation, has_aux=True, **options
  )

  def run():
    fn, state = jax.jit(passes), perturbation.init(params)
    for rows in (jnp.ones((4, 3), jnp.bfloat16),) * 2:
      _, grads, state, info = fn(params, state, rows, optimizer_state=trace)
    return grads, state, info

  expected = run()
  with jax.numpy_dtype_promotion("strict"):
    found = run()
  jax.tree.map(np.testing.assert_array_equal, found, expected)

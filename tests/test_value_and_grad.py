"""The two passes: what comes from which, and what `info` says about them."""

from by_hand import assert_near
from by_hand import flat
from by_hand import two_passes
import jax
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree
import pytest

import fsam_optax

RHO, SIGMA, LMBDA = 0.3, 0.6, 0.8
PERTURBATIONS = {
  "adaptive": dict(adaptive=True, eta=0.01),
  "masked, in the paper's order": dict(
    order="paper", mask={"hidden": True, "output": False}
  ),
}


def after_three_steps(problem, perturbation):
  """A state whose average is no multiple of any gradient."""
  state = perturbation.init(problem.params)
  for gradient in problem.gradients(3):
    _, state = perturbation.update(gradient, state, problem.params)
  return state


@pytest.mark.parametrize("options", PERTURBATIONS.values(), ids=PERTURBATIONS)
def test_info_is_what_numpy_measures(problem, options):
  params, batch = problem.params, problem.batch(3)
  perturbation = fsam_optax.friendly_perturbation(RHO, SIGMA, LMBDA, **options)
  state = after_three_steps(problem, perturbation)
  fn = fsam_optax.value_and_grad(problem.loss_fn, perturbation)
  _, _, new_state, info = jax.jit(fn)(params, state, batch)
  gradient = jax.grad(problem.loss_fn)(params, batch)
  mask = options.get("mask", {"hidden": True, "output": True})
  selected = lambda tree: flat({k: tree[k] for k in tree if mask[k]})
  g, w = selected(gradient), selected(params)
  # Masked nodes are no leaves, so this holds the selected leaves alone.
  before, after = (flat(optax.tree.get(x, "ema")) for x in (state, new_state))
  assert before.shape == g.shape
  direction = g - SIGMA * (after if "order" in options else before)
  if options.get("adaptive"):
    stretch = np.abs(w) + options.get("eta", 0.0)
    length = np.linalg.norm(stretch * direction)
    moved = RHO * np.linalg.norm(stretch**2 * direction) / length
  else:
    length, moved = np.linalg.norm(direction), RHO
  expected = {
    "gradient_norm": np.linalg.norm(flat(gradient)),
    "direction_norm": length,
    "perturbation_norm": moved,
    "gradient_ema_cosine": (
      g @ before / np.linalg.norm(g) / np.linalg.norm(before)
    ),
  }
  for name, value in expected.items():
    np.testing.assert_allclose(
      getattr(info, name), value, rtol=1e-4, err_msg=name
    )
  assert abs(expected["gradient_ema_cosine"]) > 1e-2


@pytest.mark.parametrize("name", ["friendly", "sam"])
def test_the_cosine_is_zero_where_there_is_no_average(problem, name):
  """At the first step, and always in SAM."""
  perturbation = getattr(fsam_optax, f"{name}_perturbation")(0.1)
  state = perturbation.init(problem.params)
  fn = fsam_optax.value_and_grad(problem.loss_fn, perturbation)
  _, _, _, info = fn(problem.params, state, problem.batch(0))
  assert info.gradient_ema_cosine == 0


@pytest.mark.parametrize(
  ("foreign", "length"),
  [
    (optax.chain(optax.scale(-1.0), optax.trace(0.9)), lambda norm: norm),
    (optax.set_to_zero(), lambda norm: 0.0),
    (optax.chain(fsam_optax.sam_perturbation(0.3), optax.scale(0.5)),
     lambda norm: 0.15),
  ],
  ids=["descent", "nothing", "behind a radius"],
)  # fmt: skip
def test_a_foreign_perturbation_is_measured(problem, foreign, length):
  params, batch = problem.params, problem.batch(0)
  fn = jax.jit(fsam_optax.value_and_grad(problem.loss_fn, foreign))
  _, grads, _, info = fn(params, foreign.init(params), batch)
  (_, gradient), (perturbed_loss, expected), _ = two_passes(
    problem.loss_fn, foreign, foreign.init(params), params, batch
  )
  norm = np.linalg.norm(flat(gradient))
  norms = info.gradient_norm, info.direction_norm, info.perturbation_norm
  np.testing.assert_allclose(norms, [norm, norm, length(norm)], rtol=1e-5)
  np.testing.assert_allclose(info.perturbed_value, perturbed_loss, rtol=1e-5)
  assert_near(grads, expected, 1e-4)


def test_what_is_no_array_reaches_the_loss_and_comes_back(problem):
  given = []

  def loss_fn(params, batch, key, flag):
    given.append((key.dtype, flag))
    aux = {"weights": params["output"], "flag": flag, "rows": 8}
    return problem.loss_fn(params, batch), aux

  perturbation = fsam_optax.friendly_perturbation(0.1)
  fn = fsam_optax.value_and_grad(loss_fn, perturbation, has_aux=True)
  state = perturbation.init(problem.params)
  batch, key = problem.batch(0), jax.random.key(3)
  (_, aux), *_ = fn(problem.params, state, batch, key, "flag")
  assert given == [(key.dtype, "flag")]
  # Of the clean weights.
  np.testing.assert_array_equal(aux.pop("weights"), problem.params["output"])
  assert aux == {"flag": "flag", "rows": 8}


def test_the_perturbed_value_differentiates_along_the_radius(problem):
  """d/d rho of L(w + rho u) is the perturbed gradient along u."""
  params, batch = problem.params, problem.batch(0)

  def run(rho):
    perturbation = fsam_optax.sam_perturbation(rho)
    fn = fsam_optax.value_and_grad(problem.loss_fn, perturbation)
    _, grads, _, info = fn(params, perturbation.init(params), batch)
    return info.perturbed_value, grads

  derivative, grads = jax.jit(jax.grad(run, has_aux=True))(0.2)
  (gradient,) = problem.gradients(1)
  direction = flat(gradient) / np.linalg.norm(flat(gradient))
  np.testing.assert_allclose(derivative, flat(grads) @ direction, rtol=1e-4)


def test_the_arguments_are_the_losss_own(problem):
  """None at all, any order, by keyword: each as jax.value_and_grad does."""
  perturbation = fsam_optax.friendly_perturbation(RHO, SIGMA, LMBDA)
  state = after_three_steps(problem, perturbation)
  params, batch, key = problem.params, problem.batch(3), jax.random.key(1)

  def noisy(params, key, batch, *, scale=1.0):
    noise = 0.01 * jax.random.normal(key, params["output"].shape)
    noisy_params = params | {"output": params["output"] + noise}
    return scale * problem.loss_fn(noisy_params, batch)

  calls = [
    (lambda p: problem.loss_fn(p, batch), (), {}),
    (problem.loss_fn, (), {"batch": batch}),
    (noisy, (key,), {"batch": batch, "scale": 2.0}),
  ]
  for loss_fn, args, kwargs in calls:
    fn = fsam_optax.value_and_grad(loss_fn, perturbation)
    value, grads, _, _ = fn(params, state, *args, **kwargs)
    (expected_value, _), (_, expected), _ = two_passes(
      loss_fn, perturbation, state, params, *args, **kwargs
    )
    assert_near((value, grads), (expected_value, expected), 1e-5)


def test_aux_is_each_replicas_own(problem):
  """Logits of four replicas of two rows: all eight come back, untouched."""
  perturbation = fsam_optax.friendly_perturbation(RHO)

  def loss_fn(params, batch):
    logits = batch[0] @ params["hidden"]["kernel"]
    aux = {"logits": logits, "rows": jnp.int32(len(logits))}
    return problem.loss_fn(params, batch), aux

  batch = problem.batch(0)
  fn = fsam_optax.value_and_grad(
    loss_fn, perturbation, has_aux=True, axis_name="batch"
  )
  split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
  mapped = jax.vmap(fn, in_axes=(None, None, 0), axis_name="batch")
  (loss, aux), _, _, _ = jax.jit(mapped)(
    problem.params, perturbation.init(problem.params), split
  )
  expected_loss, expected = loss_fn(problem.params, batch)
  np.testing.assert_allclose(
    aux["logits"].reshape(8, -1), expected["logits"], rtol=1e-6
  )
  assert aux["rows"].tolist() == [2, 2, 2, 2]
  np.testing.assert_allclose(loss, np.full(4, expected_loss), rtol=1e-6)


def test_of_narrow_weights_the_norm_is_what_is_left_of_the_perturbation():
  """A million bfloat16 weights: most are moved by less than their last bit."""
  draw = np.random.default_rng(0).normal
  params = {"w": jnp.asarray(draw(size=(1000, 1000)), jnp.bfloat16)}
  slope = jnp.asarray(draw(size=(1000, 1000)), jnp.bfloat16)
  perturbation = fsam_optax.sam_perturbation(rho=0.05)
  fn = fsam_optax.value_and_grad(
    lambda p, s: jnp.sum((p["w"] * s).astype(jnp.float32)), perturbation
  )
  _, _, _, info = jax.jit(fn)(params, perturbation.init(params), slope)
  # By NumPy in float64, rounded to bfloat16 once: to 8 bits, half to even.
  rounded = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64)
  w, g = rounded(params["w"]), rounded(slope)
  epsilon = rounded(0.05 * g / np.linalg.norm(g))
  moved = rounded(w + epsilon) - w
  expected = np.linalg.norm(moved)
  assert expected < 0.045
  assert (moved != 0).mean() < 0.3
  np.testing.assert_allclose(info.perturbation_norm, expected, rtol=2e-3)

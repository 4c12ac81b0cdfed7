"""How far a bfloat16 average of the gradients strays from a float32 one.

Trains a small perceptron on scikit-learn's digits with F-SAM for 1,000 steps
and feeds the same gradients to both averages. Prints, for each decay, the
norm of their difference over the norm of the float32 one: median, largest and
last of the run.

  python benchmarks/ema_drift.py [--steps 1000] [--seed 0]
"""

import argparse

import jax
from jax import numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import fsam_optax


def drift(lmbda: float, steps: int, seed: int) -> np.ndarray:
  """The relative difference after each step, shape `[steps]`."""
  inputs, labels = datasets.load_digits(return_X_y=True)
  inputs = jnp.asarray((inputs - inputs.mean()) / inputs.std(), jnp.float32)
  labels = jnp.asarray(labels)
  keys = jax.random.split(jax.random.key(seed), 3)
  params = {
    "hidden": jax.random.normal(keys[0], (64, 64)) * (2 / 64) ** 0.5,
    "bias": jnp.zeros(64),
    "output": jax.random.normal(keys[1], (64, 10)) * (2 / 64) ** 0.5,
  }

  def loss_fn(params, rows):
    hidden = jax.nn.relu(inputs[rows] @ params["hidden"] + params["bias"])
    return optax.softmax_cross_entropy_with_integer_labels(
      hidden @ params["output"], labels[rows]
    ).mean()

  perturbation = fsam_optax.friendly_perturbation(rho=0.2, lmbda=lmbda)
  half = fsam_optax.subtract_gradient_ema(
    lmbda=lmbda, accumulator_dtype=jnp.bfloat16
  )
  value_and_grad = fsam_optax.value_and_grad(loss_fn, perturbation)
  base = optax.sgd(0.02, momentum=0.9)

  def step(state, rows):
    params, perturbation_state, half_state, opt_state = state
    _, half_state = half.update(jax.grad(loss_fn)(params, rows), half_state)
    _, grads, perturbation_state, _ = value_and_grad(
      params, perturbation_state, rows
    )
    updates, opt_state = base.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    exact = perturbation_state[0].ema
    difference = jax.tree.map(lambda a, b: a - b, half_state.ema, exact)
    ratio = optax.tree.norm(difference) / optax.tree.norm(exact)
    return (params, perturbation_state, half_state, opt_state), ratio

  state = (
    params,
    perturbation.init(params),
    half.init(params),
    base.init(params),
  )
  batches = jax.random.randint(keys[2], (steps, 100), 0, len(labels))
  return np.asarray(jax.jit(lambda s: jax.lax.scan(step, s, batches))(state)[1])


def main():
  """Prints the table."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--steps", type=int, default=1000)
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  print(f"{'lmbda':>5} {'median':>8} {'largest':>8} {'last':>8}")
  for lmbda in (0.6, 0.9, 0.95, 0.99):
    ratio = drift(lmbda, args.steps, args.seed)
    print(
      f"{lmbda:5} {np.median(ratio):8.2%} {ratio.max():8.2%} {ratio[-1]:8.2%}"
    )


if __name__ == "__main__":
  main()

"""What is off costs nothing, by XLA's own count of the compiled step."""

import functools

import jax
from jax import numpy as jnp
import numpy as np
import pytest
import steps

import fsam_optax

# The counts are XLA's, and those of older compilers are others.
pytestmark = pytest.mark.skipif(
  jax.version.__version_info__ < (0, 10, 2),
  reason="counted on the XLA of jaxlib 0.10.2 and newer",
)

WIDTH, ROWS = 256, 8
PARAMS = {f"w{i}": np.eye(WIDTH, dtype=np.float32) for i in range(3)}
BATCH = np.ones((ROWS, WIDTH), np.float32)
SIZE = sum(x.nbytes for x in PARAMS.values())


def loss_fn(params, batch):
  for w in params.values():
    batch = jnp.tanh(batch @ w)
  return jnp.mean(batch**2)


def loss_of(params, model_state, batch):
  return loss_fn(params, batch), model_state


def cost(step, *args):
  compiled = jax.jit(step, donate_argnums=0).lower(*args).compile()
  return (
    compiled.cost_analysis()["bytes accessed"],
    compiled.memory_analysis().temp_size_in_bytes,
  )


@pytest.fixture(scope="module")
def cost_of():
  """The cost of a step by its name or by the options of the train step."""
  by_name = steps.steps(loss_of)
  perturbation = fsam_optax.friendly_perturbation()

  @functools.cache
  def measure(name="", **options):
    step = by_name.get(name)
    step = step or steps.train_step(loss_of, perturbation, **options)
    return cost(step.update, step.init(PARAMS, None), BATCH)

  return measure


def test_the_gradient_norm_costs_one_pass_and_only_where_asked_for(cost_of):
  words, _ = cost_of(skip_nonfinite=False, metrics=("gradient_norm",))
  without, _ = cost_of("train step, no skip")
  assert words - without == pytest.approx(SIZE, rel=0.1)


@pytest.mark.parametrize(
  ("most_words", "name"),
  [
    # The tenths above 7 and 8 are the sums of the rows, of 256 elements here.
    (7.1, "train step, no skip"),  # As by hand: what is off costs nothing.
    (8.2, "train step (default)"),
    (8.2, "train step, average of the descent"),
    (5.2, "train step, momentum as the average"),
    # From jax 0.11 on XLA reads the gradient once more.
    (11.1, "train step, paper order"),
  ],
)
def test_what_f_sam_costs_above_the_floor(cost_of, most_words, name):
  words, temporary = cost_of(name)
  floor = cost_of("floor")
  assert words - floor[0] <= most_words * SIZE
  assert temporary - floor[1] <= (1.1 if "order" in name else 0.1) * SIZE


@pytest.mark.parametrize("parts", ["4 micro-batches", "4 local"])
def test_micro_batches_cost_what_they_do_by_hand(parts, cost_of):
  words, temporary = cost_of(f"train step, {parts}")
  by_hand = cost_of(f"F-SAM by hand, {parts}")
  assert words <= by_hand[0] + SIZE
  assert temporary <= by_hand[1] + 0.2 * SIZE


def test_unread_info_is_not_computed():
  perturbation = fsam_optax.friendly_perturbation()
  fn = fsam_optax.value_and_grad(loss_fn, perturbation)
  args = (PARAMS, perturbation.init(PARAMS), BATCH)
  with_info, _ = cost(fn, *args)
  without, _ = cost(lambda *args: fn(*args)[:3], *args)
  # The gradient's norm, and the average's norm and inner product with it.
  assert with_info - without >= 3.9 * SIZE

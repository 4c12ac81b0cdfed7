"""The laws and the recorded trajectories of F-SAM, on whatever device is here.

What the tests hold on a CPU, most of it in float64, is held here on the
default device in float32, by numbers: each check returns an error and passes
where that is at most its tolerance. An error is relative to the largest element
of what is expected; where the tolerance is 0, it counts the bytes that differ.
Needs jax, flax, optax and numpy alone.
"""

from collections.abc import Collection
from collections.abc import Iterator
import concurrent.futures
import functools
import json
import os
import pathlib
from typing import Any, Callable, NamedTuple

import jax
from jax import flatten_util
from jax import numpy as jnp
import numpy as np
import optax
import optax.tree

import fsam_optax

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "golden"
# One operation in float32 rounds by 6e-8. A few of them in a row, sums over
# some thousand elements and the transcendental functions of an accelerator
# stay within some hundred of that.
ROUNDING = 1e-5
# What goes through a difference of gradients, d = g - m, loses the digits that
# these have in common.
CANCELLATION = 1e-4
# Sixty steps, each of which loses such digits and hands them on to the next: on
# a CPU the six runs stray by at most 4e-6 of the largest number of a leaf. Any
# wrong formula moves them by 1e-3 and more (tests/test_golden.py).
TRAJECTORY = 1e-4


class Check(NamedTuple):
  """A named promise: what measures its error, and how large that may be."""

  name: str
  tolerance: float
  measure: Callable[[], Any]


CHECKS: list[Check] = []


def check(name: str, tolerance: float = 0.0):
  """Adds a function without arguments that returns an error to the checks."""

  def add(measure):
    CHECKS.append(Check(name, tolerance, measure))
    return measure

  return add


def run(names: Collection[str] = ()) -> Iterator[dict[str, Any]]:
  """Yields the outcome of each check in turn.

  Args:
    names: parts of the names of those to run; all where empty.

  Yields:
    Dicts of ``check``, ``passed``, ``error``, which is None where it could not
    be measured, ``tolerance`` and ``message``, of the exception in that case.
  """
  chosen = [
    x for x in CHECKS if not names or any(part in x.name for part in names)
  ]
  # Most of the time goes to the compiler, of many small programs.
  with concurrent.futures.ThreadPoolExecutor(
    min(4, os.cpu_count() or 1)
  ) as pool:
    yield from pool.map(_outcome, chosen)


def _outcome(check: Check) -> dict[str, Any]:
  error, message = None, ""
  try:
    # Not TF32, nor the bfloat16 of a TPU's products.
    with jax.default_matmul_precision("highest"):
      error = float(check.measure())
    if not np.isfinite(error):
      error, message = None, f"the error is {error}"
  except Exception as exception:  # A check that breaks is one that fails.
    message = f"{type(exception).__name__}: {exception}"[:500]
  return {
    "check": check.name,
    "passed": error is not None and error <= check.tolerance,
    "error": error,
    "tolerance": check.tolerance,
    "message": message,
  }


def distance(found: Any, expected: Any) -> float:
  """The largest difference, relative to the largest element expected."""
  found, expected = (
    np.concatenate(
      [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
    )
    for tree in (found, expected)
  )
  if found.shape != expected.shape:
    raise ValueError(f"shapes {found.shape} and {expected.shape}")
  return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))


def different(found: Any, expected: Any) -> int:
  """The number of bytes that differ, of trees of the same shapes and dtypes."""
  if jax.tree.structure(found) != jax.tree.structure(expected):
    raise ValueError("the trees have different structures")
  number = 0
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    x, y = np.asarray(x), np.asarray(y)
    if (x.dtype, x.shape) != (y.dtype, y.shape):
      raise ValueError(f"{x.dtype}{x.shape} and {y.dtype}{y.shape}")
    x, y = (np.frombuffer(z.tobytes(), np.uint8) for z in (x, y))
    number += int(np.sum(x != y))
  return number


# ---- The problem of the laws: a regression with two layers.


def loss_fn(params: Any, batch: Any) -> jax.Array:
  """The mean squared error of a perceptron with one hidden layer."""
  inputs, targets = batch
  hidden = jnp.tanh(inputs @ params["kernel"] + params["bias"])
  return jnp.mean((hidden @ params["output"] - targets) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(loss_fn))


class Problem(NamedTuple):
  """Parameters, batches ``[T, B, ...]`` and a gradient a batch."""

  params: Any
  batches: Any
  gradients: list[Any]

  def batch(self, t: int) -> Any:
    """One of the batches."""
    return jax.tree.map(lambda x: x[t], self.batches)


@functools.cache
def problem() -> Problem:
  """The same for every check, on the default device."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  with jax.ensure_compile_time_eval():  # The first check to ask may be traced.
    params = {
      "kernel": draw(24, 64) / 5,
      "bias": draw(64),
      "output": draw(64, 10) / 8,
    }
    batches = draw(12, 32, 24), draw(12, 32, 10)
    gradients = [
      value_and_grad(params, (batches[0][t], batches[1][t]))[1]
      for t in range(6)
    ]
  return Problem(params, batches, gradients)


def ascend(perturbation: Any, gradients: Any = None, params: Any = None):
  """Lists of perturbations and states, an operation at a time.

  Not compiled as a whole: fused programs round each in their own way, and some
  of the laws hold bit for bit.
  """
  gradients = problem().gradients if gradients is None else gradients
  params = problem().params if params is None else params
  state, epsilons, states = perturbation.init(params), [], []
  for gradient in gradients:
    epsilon, state = perturbation.update(gradient, state, params)
    epsilons.append(epsilon)
    states.append(state)
  return epsilons, states


def ema_of(state: Any) -> Any:
  """The average in the state of whatever holds one."""
  is_ema = lambda x: isinstance(x, fsam_optax.SubtractGradientEmaState)
  (found,) = filter(is_ema, jax.tree.leaves(state, is_leaf=is_ema))
  return found.ema


def friendly(rho: Any = 0.1, *args: Any, **kwargs: Any) -> Any:
  """The perturbation of F-SAM."""
  return fsam_optax.friendly_perturbation(rho, *args, **kwargs)


# ---- The ascent.


@check("sigma 0 is SAM", ROUNDING)
def zero_sigma_is_sam():
  return max(
    distance(
      ascend(friendly(sigma=0.0, order=order, adaptive=adaptive))[0],
      ascend(fsam_optax.sam_perturbation(0.1, adaptive=adaptive))[0],
    )
    for order in ("official", "paper")
    for adaptive in (False, True)
  )


@check("the first step is SAM whatever sigma", ROUNDING)
def the_first_step_is_sam():
  first = problem().gradients[:1]
  sam = ascend(fsam_optax.sam_perturbation(0.1), first)[0]
  return max(
    distance(ascend(friendly(sigma=sigma), first)[0], sam)
    for sigma in (0.3, 1.0, 2.0)
  )


@check("the perturbation has norm rho", ROUNDING)
def perturbation_has_norm_rho():
  error = 0.0
  for order in ("official", "paper"):
    for rho in (1e-4, 0.05, 100.0):
      epsilons, states = jax.jit(
        lambda rho=rho, order=order: ascend(friendly(rho, 0.9, order=order))
      )()
      norms = [np.linalg.norm(_flat(epsilon)) for epsilon in epsilons]
      reported = [float(state[1].perturbation_norm) for state in states]
      error = max(error, distance([norms, reported], 2 * [len(norms) * [rho]]))
  return error


@check("the perturbation of 16 million weights has norm rho", ROUNDING)
def a_large_perturbation_has_norm_rho():
  params = jnp.zeros(2**24)
  gradient = jnp.sin(jnp.arange(2**24, dtype=jnp.float32))
  (epsilon,), _ = jax.jit(
    lambda gradient: ascend(friendly(), [gradient], params)
  )(gradient)
  return abs(np.linalg.norm(_flat(epsilon)) / 0.1 - 1)


@check("adaptive: the norm is rho relative to the weights", ROUNDING)
def adaptive_has_norm_rho():
  epsilons, _ = ascend(friendly(0.3, adaptive=True))
  params = _flat(problem().params)
  norms = [np.linalg.norm(_flat(epsilon) / params) for epsilon in epsilons]
  return distance(norms, len(norms) * [0.3])


@check("one scale on all gradients changes nothing", CANCELLATION)
def one_scale_changes_nothing():
  epsilons, states = ascend(friendly(sigma=0.7))
  error = 0.0
  for scale in (2.0**-10, 3.0, 2.0**10):
    gradients = [optax.tree.scale(scale, g) for g in problem().gradients]
    again, scaled = ascend(friendly(sigma=0.7), gradients)
    ema = optax.tree.scale(1 / scale, ema_of(scaled[-1]))
    error = max(
      error, distance(again, epsilons), distance(ema, ema_of(states[-1]))
    )
  return error


@check("opposite gradients give opposite perturbations")
def opposite_gradients():
  opposite = lambda trees: [optax.tree.scale(-1.0, tree) for tree in trees]
  return different(
    ascend(friendly(), opposite(problem().gradients))[0],
    opposite(ascend(friendly())[0]),
  )


@check("lmbda 1 freezes the average")
def lmbda_one_freezes_the_average():
  _, states = ascend(friendly(lmbda=1.0))
  first = problem().gradients[0]
  return sum(different(ema_of(state), first) for state in states)


@check("lmbda 0 remembers the last gradient alone", ROUNDING)
def lmbda_zero_remembers_the_last():
  return max(
    distance([ema_of(state) for state in states], problem().gradients)
    for order in ("official", "paper")
    for _, states in [ascend(friendly(sigma=0.5, lmbda=0.0, order=order))]
  )


@check("the average is of the gradients as they came", ROUNDING)
def the_average_is_of_the_raw_gradients():
  weights = [0.7**5] + [0.3 * 0.7 ** (5 - t) for t in range(1, 6)]
  expected = sum(
    w * _flat(g) for w, g in zip(weights, problem().gradients, strict=True)
  )
  return max(
    distance(_flat(ema_of(ascend(friendly(0.1, sigma, 0.7))[1][-1])), expected)
    for sigma in (0.0, 1.0, 1.5)
  )


@check("constant gradients leave nothing to ascend")
def constant_gradients():
  constant = 8 * problem().gradients[:1]
  zeros = optax.tree.zeros_like(problem().params)
  epsilons, _ = ascend(friendly(), constant)
  return sum(int(np.sum(_flat(x) != _flat(zeros))) for x in epsilons[1:])


@check("both orders ascend alike at sigma 1", CANCELLATION)
def both_orders_ascend_alike():
  _, states = ascend(friendly(lmbda=0.6), problem().gradients[:2])
  once = lambda order: friendly(lmbda=0.6, order=order).update(
    problem().gradients[2], states[-1], problem().params
  )[0]
  return distance(once("paper"), once("official"))


@check("a tree equals its raveled vector", ROUNDING)
def a_tree_equals_its_vector():
  ravel = lambda tree: flatten_util.ravel_pytree(tree)[0]
  on_tree, _ = ascend(friendly(sigma=0.8))
  on_vector, _ = ascend(
    friendly(sigma=0.8),
    list(map(ravel, problem().gradients)),
    ravel(problem().params),
  )
  return distance(list(map(ravel, on_tree)), on_vector)


@check("a bfloat16 average strays by its rounding", 2.0**-6)
def a_bfloat16_average():
  # It rounds by 2 ** -9 every step, of which lmbda 0.9 keeps ten.
  state = ascend(friendly(accumulator_dtype=jnp.bfloat16))[1][-1]
  if any(x.dtype != jnp.bfloat16 for x in jax.tree.leaves(ema_of(state))):
    raise TypeError("the average has left bfloat16")
  return distance(ema_of(state), ema_of(ascend(friendly())[1][-1]))


@check("a zero gradient is no perturbation")
def a_zero_gradient():
  zeros = optax.tree.zeros_like(problem().params)
  (epsilon,), _ = jax.jit(lambda: ascend(friendly(), [zeros]))()
  return different(epsilon, zeros)


@check("a non-finite gradient never enters the average")
def a_nonfinite_gradient():
  good = problem().gradients
  number = 0
  # The last one's norm alone is not finite, in float32.
  for value in (jnp.nan, jnp.inf, -jnp.inf, 1e30):
    bad = {**good[3], "bias": good[3]["bias"].at[5].set(value)}
    for order in ("official", "paper"):
      run_all = jax.jit(
        lambda bad, order=order: ascend(
          friendly(order=order), [*good[:3], bad]
        )[1]
      )
      *_, before, after = run_all(bad)
      number += different(after[0], before[0])
  return number


def _flat(tree: Any) -> np.ndarray:
  return np.concatenate(
    [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)]
  )


# ---- The chain and the two passes.


@check("rho 0 is the base optimizer, bit for bit")
def zero_radius_is_the_base_optimizer():
  # Both by the same compiled gradient, as two programs may round differently.
  number = 0
  for base in (optax.sgd(0.05, momentum=0.9, nesterov=True), optax.adamw(0.01)):
    chain = optax.chain(fsam_optax.fsam(rho=0.0), base)
    ours = theirs = problem().params
    our_state, their_state = chain.init(ours), base.init(theirs)
    for t in range(6):
      grad_fn = lambda p, t=t: value_and_grad(p, problem().batch(t))[1]
      updates, our_state = chain.update(
        grad_fn(ours), our_state, ours, grad_fn=grad_fn
      )
      ours = optax.apply_updates(ours, updates)
      updates, their_state = base.update(grad_fn(theirs), their_state, theirs)
      theirs = optax.apply_updates(theirs, updates)
    number += different(ours, theirs)
  return number


@check("the optimizer gets the gradient at the perturbed weights", ROUNDING)
def the_gradient_at_the_perturbed_weights():
  fn = jax.jit(fsam_optax.value_and_grad(loss_fn, friendly(0.5)))
  params, batch = problem().params, problem().batch(0)
  loss, grads, _, info = fn(params, friendly(0.5).init(params), batch)
  (epsilon,), _ = ascend(friendly(0.5), problem().gradients[:1])
  at = optax.apply_updates(params, epsilon)
  expected = value_and_grad(params, batch)[0], *value_and_grad(at, batch)
  return distance((loss, info.perturbed_value, grads), expected)


@check("a linear loss rises by rho times its gradient", ROUNDING)
def a_linear_loss_rises():
  perturbation = fsam_optax.sam_perturbation(0.1)
  slope, params = jnp.array([3.0, -4.0, 12.0]), jnp.ones(3)
  fn = fsam_optax.value_and_grad(lambda w, b: jnp.sum(b * w), perturbation)
  loss, _, _, info = jax.jit(fn)(params, perturbation.init(params), slope)
  return abs((float(info.perturbed_value) - float(loss)) / 1.3 - 1)


@check("sigma 0 trains as optax.contrib.sam", CANCELLATION)
def trains_as_contrib_sam():
  base = lambda: optax.sgd(0.05, momentum=0.9)
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
  theirs = optax.contrib.sam(
    base(), ascent, sync_period=2, opaque_mode=True, reset_state=False
  )
  ours = optax.chain(fsam_optax.fsam(0.1, sigma=0.0), base())
  return distance(_trained(ours), _trained(theirs))


def _trained(tx):
  """The parameters after one pass over the batches, in one program."""

  def step(carry, batch):
    params, state = carry
    grad_fn = lambda p, *_: jax.grad(loss_fn)(p, batch)
    updates, state = tx.update(grad_fn(params), state, params, grad_fn=grad_fn)
    return (optax.apply_updates(params, updates), state), None

  start = lambda params: (params, tx.init(params))
  train = jax.jit(lambda p: jax.lax.scan(step, start(p), problem().batches)[0])
  return train(problem().params)[0]


# ---- The train step.


def stepping(loss: Callable[..., Any] = loss_fn, rho: Any = 0.1, **options):
  """A fresh state with a model state, and the step, which keeps the state."""

  def with_model_state(params, model_state, batch, rng):
    del rng
    return loss(params, batch), ({"seen": model_state["seen"] + 1}, {})

  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params=problem().params,
    tx=optax.sgd(0.05, momentum=0.9),
    perturbation=friendly(rho),
    model_state={"seen": jnp.zeros([], jnp.int32)},
  )
  step = fsam_optax.make_train_step(with_model_state, jit=False, **options)
  return state, jax.jit(step)


def several(number: int = 3, **options):
  """The state after so many steps, and the metrics of each."""
  state, step = stepping(**options)
  metrics = []
  for t in range(number):
    state, found = step(state, problem().batch(t))
    metrics.append(found)
  return state, metrics


def kept(state: Any) -> tuple[Any, ...]:
  """What a skipped step leaves as it was."""
  return state.params, state.opt_state, state.model_state, state.step


@check("the train step trains as the chain", CANCELLATION)
def trains_as_the_chain():
  chain = optax.chain(fsam_optax.fsam(0.1), optax.sgd(0.05, momentum=0.9))
  state, _ = several(number=12)
  return distance(state.params, _trained(chain))


@check("a step that is not finite is skipped, bit for bit")
def a_skipped_step():
  state, step = stepping()
  state, _ = step(state, problem().batch(0))
  inputs, targets = problem().batch(1)
  after, metrics = step(state, (inputs.at[0, 0].set(jnp.nan), targets))
  return (
    different(kept(after), kept(state))
    + different(after.perturbation_state[0], state.perturbation_state[0])
    + abs(int(metrics["skipped"]) - 1)
  )


def _skipped_by_its_second_pass(value):
  """With what a loss adds but at the parameters, where the loss is finite."""

  def loss(params, batch):
    at_start = jnp.all(params["bias"] == problem().params["bias"])
    added = jax.lax.cond(at_start, jnp.zeros_like, value, params["bias"][0])
    return loss_fn(params, batch) + added

  state, step = stepping(loss)
  after, metrics = step(state, problem().batch(0))
  ema = _flat(ema_of(after.perturbation_state))
  return (
    different(kept(after), kept(state))
    + abs(int(metrics["skipped"]) - 1)
    + int(np.sum(~np.isfinite(ema)))
  )


@check("a step whose second loss is not finite is skipped, bit for bit")
def a_step_with_an_infinite_second_loss():
  return _skipped_by_its_second_pass(lambda x: jnp.full_like(x, jnp.inf))


@check("a step whose second gradient is not finite is skipped, bit for bit")
def a_step_with_a_nonfinite_second_gradient():
  # The root of zero, whose slope is infinite.
  return _skipped_by_its_second_pass(lambda x: jnp.sqrt(0 * x))


@check("a finite step is the same with the skip and without", ROUNDING)
def the_skip_changes_nothing():
  state, metrics = several()
  unguarded, _ = several(skip_nonfinite=False)
  skipped = sum(int(found["skipped"]) for found in metrics)
  return distance(state.params, unguarded.params) + skipped


@check("the average of the descent is of the second gradient", ROUNDING)
def the_average_of_the_descent():
  state, step = stepping(ema_gradient="descent")
  state, _ = step(state, problem().batch(0))
  (epsilon,), _ = ascend(friendly(), problem().gradients[:1])
  at = optax.apply_updates(problem().params, epsilon)
  expected = value_and_grad(at, problem().batch(0))[1]
  return distance(ema_of(state.perturbation_state), expected)


@check("4 micro-batches are the whole batch", CANCELLATION)
def microbatches_are_the_whole_batch():
  return distance(several(num_microbatches=4)[0].params, several()[0].params)


@check("an eighth of the rows gives the direction", ROUNDING)
def an_eighth_gives_the_direction():
  state, step = stepping(ascent_fraction=1 / 8)
  _, metrics = step(state, problem().batch(0))
  # The first of every eight rows.
  part = jax.tree.map(lambda x: x[::8], problem().batch(0))
  loss, gradient = value_and_grad(problem().params, part)
  (epsilon,), _ = ascend(friendly(), [gradient])
  at = optax.apply_updates(problem().params, epsilon)
  expected = loss, value_and_grad(at, problem().batch(0))[0]
  return distance((metrics["loss"], metrics["perturbed_loss"]), expected)


@check("every=2 ascends on every second step", ROUNDING)
def every_second_step_ascends():
  _, metrics = several(number=4, every=2)
  norms = [float(found["perturbation_norm"]) for found in metrics]
  return distance(norms, [0.1, 0.0, 0.1, 0.0])


@check("all metrics are those of the gradients", ROUNDING)
def metrics_of_the_gradients():
  names = ("gradient_norm", "direction_norm", "gradient_ema_cosine")
  _, metrics = several(number=1, metrics=names)
  norm = np.linalg.norm(_flat(problem().gradients[0]))
  found = [metrics[0][name] for name in names[:2]]
  return distance(found, [norm, norm])


# ---- The authors' trajectories.


class Seen(NamedTuple):
  """What a replay saw; the leading axis of every leaf is the step."""

  loss: Any
  perturbed_loss: Any
  perturbation: Any
  params_after: Any
  ema_after: Any


def replay(record: dict[str, Any], door: Callable[..., Any]) -> float:
  """The largest error of a recorded run, by a door into the package."""
  to_device = lambda x, dtype: jnp.asarray(np.asarray(x), dtype)
  rows = np.asarray(record["batches"])
  batches = tuple(
    to_device(np.asarray(record[name])[rows], dtype)
    for name, dtype in (
      ("inputs", jnp.float32),
      ("targets", jnp.float32),
      ("labels", jnp.int32),
    )
  )
  params = {
    name: to_device(x, jnp.float32)
    for name, x in record["initial_params"].items()
  }
  seen = jax.jit(lambda p, b: door(record, p, b))(params, batches)._asdict()
  error = 0.0
  for recorded in record["trajectory"]:
    for name, values in seen.items():
      found = jax.tree.map(lambda x, t=recorded["step"]: x[t], values)
      expected = recorded[name]
      if isinstance(found, dict):  # Leaf by leaf, by their names.
        found = [found[key] for key in expected]
        expected = [np.asarray(x) for x in expected.values()]
      error = max(error, distance(found, expected))
  return error


def _loss_of(record):
  def recorded_loss(params, batch):
    inputs, targets, labels = batch
    hidden = jnp.tanh(inputs @ params["hidden/kernel"] + params["hidden/bias"])
    outputs = hidden @ params["output/kernel"] + params["output/bias"]
    if record["config"]["task"] == "regression":
      return jnp.mean((outputs - targets) ** 2)
    losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
    return jnp.mean(losses)

  return recorded_loss


def _base_of(record):
  kwargs = dict(record["config"]["base_kwargs"])
  learning_rate, decay = kwargs.pop("lr"), kwargs.pop("weight_decay")
  if record["config"]["base"] == "AdamW":
    return optax.adamw(learning_rate, weight_decay=decay)
  sgd = optax.sgd(learning_rate, **kwargs)
  return optax.chain(optax.add_decayed_weights(decay), sgd)


def _remembering(record):
  """The recorded perturbation, with its last output beside its state."""
  names = ("rho", "sigma", "lmbda", "adaptive")
  perturbation = fsam_optax.friendly_perturbation(
    **{name: record["config"][name] for name in names}
  )

  def init_fn(params):
    return perturbation.init(params), optax.tree.zeros_like(params)

  def update_fn(updates, state, params=None):
    epsilon, inner = perturbation.update(updates, state[0], params)
    return epsilon, (inner, epsilon)

  return optax.GradientTransformation(init_fn, update_fn)


def _through_chain(record, params, batches):
  loss = _loss_of(record)
  link = fsam_optax.sharpness_aware(_remembering(record))
  tx = optax.chain(link, _base_of(record))

  def step(carry, batch):
    params, state = carry
    perturbed_losses = []

    def grad_fn(perturbed):
      value, grads = jax.value_and_grad(loss)(perturbed, batch)
      perturbed_losses.append(value)
      return grads

    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
    params = optax.apply_updates(params, updates)
    (perturbed_loss,) = perturbed_losses
    epsilon = state[0][1]
    return (params, state), Seen(
      value, perturbed_loss, epsilon, params, ema_of(state)
    )

  return jax.lax.scan(step, (params, tx.init(params)), batches)[1]


def _through_value_and_grad(record, params, batches):
  tx, perturbation = _base_of(record), _remembering(record)
  fn = fsam_optax.value_and_grad(_loss_of(record), perturbation)

  def step(carry, batch):
    params, state, ascent = carry
    value, grads, ascent, info = fn(params, ascent, batch)
    updates, state = tx.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state, ascent), Seen(
      value, info.perturbed_value, ascent[1], params, ema_of(ascent)
    )

  carry = params, tx.init(params), perturbation.init(params)
  return jax.lax.scan(step, carry, batches)[1]


def _through_train_step(record, params, batches):
  loss = _loss_of(record)
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params=params,
    tx=_base_of(record),
    perturbation=_remembering(record),
  )
  train_step = fsam_optax.make_train_step(
    lambda params, model_state, batch, rng: (
      loss(params, batch),
      (model_state, {}),
    ),
    jit=False,
  )

  def step(state, batch):
    state, metrics = train_step(state, batch)
    ascent = state.perturbation_state
    return state, Seen(
      metrics["loss"],
      metrics["perturbed_loss"],
      ascent[1],
      state.params,
      ema_of(ascent),
    )

  return jax.lax.scan(step, state, batches)[1]


DOORS = {
  "chain": _through_chain,
  "value_and_grad": _through_value_and_grad,
  "train step": _through_train_step,
}
RUNS = (
  "adamw",
  "adaptive",
  "sgd_cifar100_recipe",
  "sgd_default",
  "sgd_partial_sigma",
  "sigma_zero_is_sam",
)


def _add_trajectories() -> None:
  for run_name in RUNS:
    for door_name, door in DOORS.items():
      check(f"the authors' path: {run_name}, {door_name}", TRAJECTORY)(
        lambda run_name=run_name, door=door: replay(
          json.loads((GOLDEN / f"{run_name}.json").read_text()), door
        )
      )


_add_trajectories()

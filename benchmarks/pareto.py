"""Accuracy against cost: which gradient may the ascent do without?

Trains SGD, SAM, F-SAM and their cheaper forms on real digits with wrong labels.
Every form gets the same search for its radius: twelve radii on the validation
rows of 4 seeds, then those around the best on 12 other seeds until the best of
these lies inside; a best at an end of the radii has twelve more beyond it. The
accuracy is that of 48 other seeds, on the test rows, paired against full F-SAM.
Weight decay is 5e-4, not tuned.

  python benchmarks/pareto.py [--datasets mnist] [--models mlp] [--noise 0.4]
                              [--arms ...] [--output pareto.jsonl] [--quick]
  python benchmarks/pareto.py --report [--plot pareto.png]

What is in the output already is not trained again.
"""

import argparse
import functools
import itertools
import json
import pathlib
import time
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.seeds import one_run
from fsam_optax.experiments.seeds import recipes
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds import trainer as trainer_lib
from fsam_optax.experiments.studies import arms
from fsam_optax.experiments.studies import directions

BATCH_SIZE = 96
LMBDA = 0.9
RADII = tuple(0.1 * 1.25**i for i in range(12))  # 0.1 to 1.2.
RATES = tuple(0.001 * 1.5**i for i in range(12))  # Of SGD, 0.001 to 0.09.
WIDENINGS = 3  # At most, of a ladder whose best is at an end.
# As many runs in each of the three, so that each form is compiled once.
COARSE_SEEDS, FINE_SEEDS, TEST_SEEDS = range(4), range(4, 16), range(1000, 1048)
# Of every form but SGD, which is tuned: the best of F-SAM's at 40 % noise.
LEARNING_RATE = {
  ("mnist", "mlp"): 0.02,
  ("mnist", "cnn"): 0.01,
  ("digits", "mlp"): 0.03,
  ("digits", "cnn"): 0.02,
}
EPOCHS = {"mnist": 60, "digits": 100}


def previous_gradient() -> optax.GradientTransformation:
  """What it was given at the update before, in the place of the gradient."""

  def init_fn(params):
    return jax.tree.map(jnp.zeros_like, params)

  def update_fn(updates, state, params=None):
    del params
    return state, updates

  return optax.GradientTransformation(init_fn, update_fn)


class HoldState(NamedTuple):
  """State of :func:`hold`: its count, what it holds and the inner state."""

  count: jax.Array
  held: Any
  inner: Any


def hold(
  inner: optax.GradientTransformation, every: int
) -> optax.GradientTransformation:
  """The inner perturbation at every k-th step, and again until the next."""

  def init_fn(params):
    return HoldState(
      jnp.zeros([], jnp.int32),
      jax.tree.map(jnp.zeros_like, params),
      inner.init(params),
    )

  def update_fn(updates, state, params=None):
    fresh, fresh_state = inner.update(updates, state.inner, params)
    is_fresh = state.count % every == 0
    choose = lambda a, b: jax.tree.map(
      lambda x, y: jnp.where(is_fresh, x, y), a, b
    )
    held = choose(fresh, state.held)
    count = optax.safe_increment(state.count)
    return held, HoldState(count, held, choose(fresh_state, state.inner))

  return optax.GradientTransformation(init_fn, update_fn)


def fsam(rho: Any) -> optax.GradientTransformation:
  """F-SAM's ascent."""
  return fsam_optax.friendly_perturbation(rho, lmbda=LMBDA)


class ParallelState(NamedTuple):
  """What :func:`parallel_step` keeps for the ascent of the next step.

  Attributes:
    inner: state of the ascent.
    gradient: the last gradient at the auxiliary weights.
  """

  inner: Any
  gradient: Any


def parallel(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent whose state also holds a gradient, for :func:`parallel_step`."""

  def init_fn(params):
    return ParallelState(
      inner.init(params), jax.tree.map(jnp.zeros_like, params)
    )

  return optax.GradientTransformation(init_fn, inner.update)


def parallel_step(
  loss_fn: Callable[..., Any],
  *,
  rate: Callable[[jax.Array], jax.Array],
  share: float = 0.2,
  **options: Any,
) -> Callable[[Any, Any], Any]:
  """SAMPa's step: two gradients that do not wait for each other.

  From the last gradient at the auxiliary weights follow both points, at once:
  the perturbed weights, and the next auxiliary weights, which are a step of
  gradient descent away. The optimizer gets the mean of the two gradients, with
  ``share`` of the auxiliary one (Xie et al., `SAMPa
  <https://arxiv.org/abs/2410.10683>`_, 2024). With the ascent of F-SAM it is
  the friendly form.

  Args:
    loss_fn: as for :func:`fsam_optax.make_train_step`.
    rate: learning rate of the auxiliary step, from the number of the step.
    share: weight of the auxiliary gradient, in ``[0, 1]``.
    **options: of :func:`fsam_optax.make_train_step`, ignored.

  Returns:
    A step for a state whose ascent is :func:`parallel`.
  """
  del options

  def step(state, batch):
    pass_at = jax.value_and_grad(
      lambda params: loss_fn(params, None, batch, None)[0]
    )
    inner, gradient = state.perturbation_state
    epsilon, inner = state.perturbation.update(gradient, inner, state.params)
    scale = -rate(state.step)
    auxiliary = optax.tree.add_scale(state.params, scale, gradient)
    loss, auxiliary_gradient = pass_at(auxiliary)
    _, perturbed_gradient = pass_at(optax.tree.add(state.params, epsilon))
    gradient = jax.tree.map(
      lambda a, b: share * a + (1 - share) * b,
      auxiliary_gradient,
      perturbed_gradient,
    )
    state = state.apply_gradients(
      grads=gradient,
      perturbation_state=ParallelState(inner, auxiliary_gradient),
    )
    return state, {"loss": loss}

  return step


class GateState(NamedTuple):
  """What :func:`gated_step` keeps.

  Attributes:
    inner: state of the ascent.
    mean: of the squared norms of the gradients, shape ``[]``.
    steps: taken, shape ``[]``, int32.
    ascents: steps that took both gradients, shape ``[]``, int32.
  """

  inner: Any
  mean: jax.Array
  steps: jax.Array
  ascents: jax.Array


def gated(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """An ascent whose state also holds what :func:`gated_step` keeps."""

  def init_fn(params):
    zero = jnp.zeros([], jnp.int32)
    return GateState(inner.init(params), jnp.zeros([]), zero, zero)

  return optax.GradientTransformation(init_fn, inner.update)


def gated_step(
  loss_fn: Callable[..., Any], **options: Any
) -> Callable[[Any, Any], Any]:
  """A step that ascends where the gradient is longer than it used to be.

  Where its squared norm is above the moving average of those before (decay 0.9,
  that of the first step at first), as in AE-SAM (Jiang et al., `An Adaptive
  Policy to Employ Sharpness-Aware Minimization
  <https://arxiv.org/abs/2304.14647>`_, 2023) with a threshold of no standard
  deviations. Many runs at once take both gradients always, and use one; what
  would be paid is in the count of the ascents.

  Args:
    loss_fn: as for :func:`fsam_optax.make_train_step`; it draws nothing.
    **options: of :func:`fsam_optax.make_train_step`, ignored.

  Returns:
    A step for a state whose ascent is :func:`gated`.
  """
  del options

  def step(state, batch):
    pass_at = jax.value_and_grad(
      lambda params: loss_fn(params, state.model_state, batch, state.rng),
      has_aux=True,
    )
    inner, mean, steps, ascents = state.perturbation_state
    (loss, (model_state, _)), gradient = pass_at(state.params)
    square = optax.tree.norm(gradient, squared=True)
    mean = jnp.where(steps == 0, square, mean)
    ascends = square > mean
    epsilon, inner = state.perturbation.update(gradient, inner, state.params)
    epsilon = jax.tree.map(lambda x: jnp.where(ascends, x, 0), epsilon)
    _, gradient = pass_at(optax.tree.add(state.params, epsilon))
    kept = GateState(
      inner, 0.9 * mean + 0.1 * square, steps + 1, ascents + ascends
    )
    state = state.apply_gradients(
      grads=gradient, perturbation_state=kept, model_state=model_state
    )
    return state, {"loss": loss}

  return step


class Arm(NamedTuple):
  """A way to train.

  Attributes:
    perturbation: from a radius; None for SGD.
    gradients: evaluations a step, in gradients of the whole batch; for twice
      the epochs, both steps'; of :func:`gated_step` at most.
    options: of :func:`fsam_optax.make_train_step`.
    epochs: how many times the epochs of the others.
    radius_unit: by which the radii are multiplied.
    make_step: what makes its step.
    last: fraction of the training, at its end, in which it ascends.
  """

  perturbation: Optional[Callable[[Any], optax.GradientTransformation]]
  gradients: float
  options: dict[str, Any]
  epochs: int = 1
  radius_unit: float = 1.0
  make_step: Callable[..., Any] = fsam_optax.make_train_step
  last: float = 1.0


DESCENT = {"ema_gradient": "descent"}
ARMS = {
  "F-SAM": Arm(fsam, 2, {}),
  "SGD": Arm(None, 1, {}),
  "SAM": Arm(fsam_optax.sam_perturbation, 2, {}),
  "F-SAM, 1/8": Arm(fsam, 1.125, {"ascent_fraction": 1 / 8}, radius_unit=1.5),
  "SAM, 1/8": Arm(
    fsam_optax.sam_perturbation,
    1.125,
    {"ascent_fraction": 1 / 8},
    radius_unit=1.5,
  ),
  "F-SAM, 1/8, descent average": Arm(
    fsam, 1.125, {"ascent_fraction": 1 / 8, **DESCENT}, radius_unit=1.5
  ),
  "F-SAM, 1/4": Arm(fsam, 1.25, {"ascent_fraction": 1 / 4}),
  "F-SAM, 1/2": Arm(fsam, 1.5, {"ascent_fraction": 1 / 2}),
  "F-SAM, 1/16": Arm(
    fsam, 1.0625, {"ascent_fraction": 1 / 16}, radius_unit=1.5
  ),
  "random direction": Arm(
    lambda rho: directions.along(directions.random_direction(), rho),
    1,
    {},
    radius_unit=20.0,
  ),
  "SGD, twice the epochs": Arm(None, 2, {}, epochs=2),
  "F-SAM, every 2nd step": Arm(fsam, 1.5, {"every": 2}, radius_unit=1.5),
  "F-SAM, 1/8, every 2nd step": Arm(
    fsam, 1.0625, {"every": 2, "ascent_fraction": 1 / 8}, radius_unit=1.5
  ),
  "F-SAM, perturbation held for 2 steps": Arm(
    lambda rho: hold(fsam(rho), 2), 1.5, {}
  ),
  "F-SAM, previous descent gradient": Arm(
    lambda rho: optax.chain(previous_gradient(), fsam(rho)), 1, DESCENT
  ),
  "F-SAM, two gradients at once": Arm(
    lambda rho: parallel(fsam(rho)),
    2,
    {},
    radius_unit=1.5,
    make_step=parallel_step,
  ),
  "SAM, two gradients at once": Arm(
    lambda rho: parallel(fsam_optax.sam_perturbation(rho)),
    2,
    {},
    radius_unit=1.5,
    make_step=parallel_step,
  ),
  "along the momentum": Arm(
    lambda rho: directions.along(
      optax.chain(optax.trace(one_run.MOMENTUM), previous_gradient()), rho
    ),
    1,
    DESCENT,
  ),
  **{
    f"{name}, last {last:.0%}".replace("%", " %"): Arm(
      ascent, 1 + last, {}, last=last
    )
    for name, ascent in (("SAM", fsam_optax.sam_perturbation), ("F-SAM", fsam))
    for last in (0.1, 0.2, 0.3)
  },
  **{
    f"{name}, at long gradients": Arm(
      lambda rho, ascent=ascent: gated(ascent(rho)),
      2,
      {},
      radius_unit=1.5,
      make_step=gated_step,
    )
    for name, ascent in (("SAM", fsam_optax.sam_perturbation), ("F-SAM", fsam))
  },
}


def load(dataset: str) -> splits_lib.Pool:
  """A data set, its images scaled as those of ``compare`` are."""
  return splits_lib.load(dataset, recipes.recipe(dataset, "mlp").image_size)


def step_options(arm: Arm, steps: int) -> dict[str, Any]:
  """What an arm's step is made with, in a training of so many steps."""
  if arm.last == 1:
    return arm.options
  return {**arm.options, "start": round((1 - arm.last) * steps)}


def gradients_of(arm: Arm, state: Any) -> float:
  """Evaluations a step: an arm's, or those that a gate let through.

  Args:
    arm: that was trained.
    state: of its ascent after training, perhaps of many runs.

  Returns:
    In gradients of the whole batch.
  """
  if arm.make_step is not gated_step:
    return arm.gradients
  return 1 + round(float(np.mean(state.ascents / state.steps)), 3)


def trainer_of(
  arm: Arm, pool: splits_lib.Pool, model: str, epochs: int
) -> trainer_lib.Trainer:
  """Trains by this arm."""
  steps = epochs * (pool.train_size // BATCH_SIZE)
  options = {**step_options(arm, steps), "make_step": arm.make_step}
  if arm.make_step is parallel_step:
    learning_rate = LEARNING_RATE[pool.name, model]
    options["make_step"] = functools.partial(
      parallel_step,
      rate=lambda count: (
        learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
      ),
    )
  return trainer_lib.Trainer(
    networks.REGISTRY[model].create(pool.classes),
    pool,
    sigma=1.0,
    lmbda=LMBDA,
    epochs=epochs,
    batch_size=BATCH_SIZE,
    perturbations={} if arm.perturbation is None else {"arm": arm.perturbation},
    **options,
  )


def time_arms(
  names: list[str], pool: splits_lib.Pool, model: str, rounds: int
) -> dict[str, float]:
  """Time of one run's steps by each arm, in turn, over SGD's.

  Args:
    names: of the arms; SGD is among them.
    pool: the data set.
    model: ``"mlp"`` or ``"cnn"``.
    rounds: after one that warms up.

  Returns:
    The median ratio of each arm, by name.
  """
  trainers = {
    name: trainer_of(ARMS[name], pool, model, epochs=21) for name in names
  }
  splits = splits_lib.split(pool, [0], 0.4)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for _ in range(rounds + 1):
    for name, trainer in trainers.items():
      stamps: list[float] = []
      trainer(
        "sgd" if ARMS[name].perturbation is None else "arm",
        splits,
        np.array([0.01]),
        np.array([0.1]),
        with_curve=False,
        on_epoch=lambda stamps=stamps: stamps.append(time.perf_counter()),
      )
      seconds[name].append((stamps[-1] - stamps[0]) * ARMS[name].epochs)
  times = {name: np.array(x[1:]) for name, x in seconds.items()}
  return {name: float(np.median(x / times["SGD"])) for name, x in times.items()}


def widen(
  ladder: np.ndarray,
  found: np.ndarray,
  best: float,
  evaluate: Callable[[np.ndarray], np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
  """Continues a ladder beyond the end at which its best is.

  Args:
    ladder: values in geometric sequence, ascending.
    found: what each is worth.
    best: its first or its last value.
    evaluate: from as many values as the ladder first had, so that nothing is
      compiled for it, to what each is worth.

  Returns:
    The longer ladder, and what each of its values is worth.
  """
  number = len(RADII)
  span = (ladder[1] / ladder[0]) ** number
  if best == ladder[0]:
    more = ladder[:number] / span
    order = slice(None)
  else:
    more = ladder[-number:] * span
    order = slice(None, None, -1)
  join = lambda *parts: np.concatenate(parts[order])
  return join(more, ladder), join(evaluate(more), found)


class Chosen(NamedTuple):
  """What the search on a ladder found.

  Attributes:
    best: value of the ladder.
    is_at_the_end: whether the values around it were not seen to fall off.
    coarse: the ladder, and what each of its values is worth by few seeds.
    fine: those around the best, and what each is worth by more seeds.
  """

  best: float
  is_at_the_end: bool
  coarse: list[list[float]]
  fine: list[list[float]]


def choose(
  ladder: np.ndarray,
  first: np.ndarray,
  coarse: Callable[[np.ndarray], np.ndarray],
  fine: Callable[[np.ndarray], np.ndarray],
  widenings: int,
) -> Chosen:
  """The best value by ``fine``, around the best by ``coarse``.

  The window of four values moves on while its best lies at an end of what was
  seen, beyond the ladder too.

  Args:
    ladder: values in geometric sequence, ascending.
    first: what ``coarse`` says of them.
    coarse: from as many values as the ladder has to what each is worth.
    fine: from four values to what each is worth, by other and more seeds.
    widenings: how often the ladder may be continued.

  Returns:
    What was found.
  """
  # Two below the best and one above, or what the ends allow.
  start = int(np.clip(np.argmax(first) - 2, 0, len(ladder) - 4))
  second: dict[float, float] = {}
  while True:
    near = ladder[start : start + 4]
    second |= zip(near.tolist(), fine(near).tolist(), strict=True)
    seen = sorted(second)
    best = max(seen, key=lambda value: second[value])
    is_at_the_end = best in (seen[0], seen[-1])
    if is_at_the_end and best in (ladder[0], ladder[-1]):
      if not widenings:
        break
      widenings -= 1
      ladder, first = widen(ladder, first, best, coarse)
    if not is_at_the_end:
      break
    index = int(np.flatnonzero(ladder == best)[0])
    start = index - 4 if best == seen[0] else index + 1
    start = int(np.clip(start, 0, len(ladder) - 4))
  return Chosen(
    best,
    is_at_the_end,
    [ladder.tolist(), first.tolist()],
    [seen, [second[value] for value in seen]],
  )


def run_arm(
  arm: Arm,
  pool: splits_lib.Pool,
  model: str,
  noise: float,
  scale: float,
  sgd_rate: Optional[float] = None,
) -> dict[str, Any]:
  """Searches the radius, or SGD's learning rate, and tests.

  Args:
    arm: the form.
    pool: the data set.
    model: ``"mlp"`` or ``"cnn"``.
    noise: fraction of wrong labels, in ``[0, 1)``.
    scale: of the epochs and the seeds, 1 but to see that it runs.
    sgd_rate: SGD's learning rate here, for a form that is SGD most of the
      time: it is tried as well as that of the others.

  Returns:
    What was chosen, how, and what it does on the test rows.
  """
  seeds = lambda chosen: chosen[: max(1, round(len(chosen) * scale))]
  coarse, fine, test = map(seeds, (COARSE_SEEDS, FINE_SEEDS, TEST_SEEDS))
  epochs = max(1, round(EPOCHS[pool.name] * scale)) * arm.epochs
  trainer = trainer_of(arm, pool, model, epochs)

  def train(values, chosen, rate=LEARNING_RATE[pool.name, model]):
    """Every value on every seed, at once."""
    values = np.asarray(values)
    splits = jax.tree.map(
      lambda x: np.concatenate([x] * len(values)),
      splits_lib.split(pool, list(chosen), noise),
    )
    runs = np.repeat(values, len(chosen))
    name, rates, radii = "arm", np.full_like(runs, rate), runs
    if arm.perturbation is None:
      name, rates, radii = "sgd", runs, 0 * runs
    decays = np.full_like(runs, arms.UNTUNED_DECAY)
    return trainer(name, splits, rates, radii, decays, with_curve=False)

  ladder = arm.radius_unit * np.array(
    RATES if arm.perturbation is None else RADII
  )
  validation = lambda outcome, number: outcome.validation_accuracy.reshape(
    number, -1
  ).mean(axis=1)
  rates = [LEARNING_RATE[pool.name, model]]
  if arm.last < 1:
    rates.append(sgd_rate)
  at_rate = {
    rate: validation(train(ladder, coarse, rate), len(ladder)) for rate in rates
  }
  rate = max(at_rate, key=lambda rate: at_rate[rate].max())
  worth = lambda seeds: (
    lambda values: validation(train(values, seeds, rate), len(values))
  )
  chosen = choose(
    ladder,
    at_rate[rate],
    worth(coarse),
    worth(fine),
    0 if scale < 1 else WIDENINGS,
  )
  outcome = train([chosen.best], test, rate)
  return {
    "learning_rate": chosen.best if arm.perturbation is None else float(rate),
    "rho": None if arm.perturbation is None else chosen.best,
    "weight_decay": arms.UNTUNED_DECAY,
    "is_at_the_end": chosen.is_at_the_end,
    "coarse": chosen.coarse,
    "fine": chosen.fine,
    "test_seeds": list(test),
    "test_accuracy": outcome.test_accuracy.tolist(),
    "diverged": int(outcome.diverged.sum()),
    "gradients": gradients_of(arm, outcome.perturbation_state),
    "seconds": outcome.seconds - outcome.compile_seconds,
    "epochs": epochs,
  }


def rule_of(fraction: float) -> float:
  """By how much the radius grows as the ascent sees fewer rows."""
  return fraction ** (-1 / 5)


def rule_name(fraction: float) -> str:
  """Of the form with this fraction at the rule's radius."""
  return f"F-SAM, 1/{round(1 / fraction)}, descent average, rho by the rule"


FRACTIONS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)


def run_rule(
  full: dict[str, Any], fraction: float, pool: splits_lib.Pool
) -> dict[str, Any]:
  """Tests a fraction at full F-SAM's radius times the rule, with no search."""
  trainer = trainer_lib.Trainer(
    networks.REGISTRY[full["model"]].create(pool.classes),
    pool,
    sigma=1.0,
    lmbda=LMBDA,
    epochs=full["epochs"],
    batch_size=BATCH_SIZE,
    perturbations={"arm": fsam},
    ascent_fraction=fraction,
    **DESCENT,
  )
  number = len(full["test_seeds"])
  rho = full["rho"] * rule_of(fraction)
  outcome = trainer(
    "arm",
    splits_lib.split(pool, full["test_seeds"], full["label_noise"]),
    np.full(number, full["learning_rate"]),
    np.full(number, rho),
    np.full(number, arms.UNTUNED_DECAY),
    with_curve=False,
  )
  return {
    **full,
    "arm": rule_name(fraction),
    "rho": rho,
    "is_at_the_end": False,
    "coarse": None,
    "fine": None,
    "test_accuracy": outcome.test_accuracy.tolist(),
    "diverged": int(outcome.diverged.sum()),
    "gradients": 1 + fraction,
    "seconds": outcome.seconds - outcome.compile_seconds,
  }


def read(path: pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a JSON Lines file that may not be there yet."""
  if not path.exists():
    return []
  return [json.loads(line) for line in path.read_text().splitlines()]


def setting_of(row: dict[str, Any]) -> tuple[str, str, float]:
  """What a row was trained on."""
  return row["dataset"], row["model"], row["label_noise"]


def print_report(rows: list[dict[str, Any]]) -> None:
  """A table a setting: accuracies, and differences to F-SAM and to SAM."""
  for setting, group in itertools.groupby(
    sorted(rows, key=setting_of), setting_of
  ):
    by_arm = {row["arm"]: row for row in group}
    order = list(by_arm)
    dataset, model, noise = setting
    print(f"\n{dataset}, {model}, label noise {noise:g}\n")
    header = ["form", "gradients", "learning rate", "rho", "test accuracy (%)"]
    header += ["over F-SAM", "over SAM"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for name in sorted(order, key=lambda name: by_arm[name]["gradients"]):
      row = by_arm[name]
      accuracy = np.array(row["test_accuracy"])
      rho = "" if row["rho"] is None else f"{row['rho']:.3g}"
      cells = [
        name,
        f"{row['gradients']:g}",
        f"{row['learning_rate']:.2g}",
        rho + ("*" if row["is_at_the_end"] else ""),
        f"{accuracy.mean():.2f} ± {statistics.standard_error(accuracy):.2f}",
      ]
      for other in ("F-SAM", "SAM"):
        if other not in by_arm or other == name:
          cells.append("")
          continue
        pair = statistics.paired(accuracy, by_arm[other]["test_accuracy"])
        cells.append(
          f"{pair['mean']:+.2f} ± {pair['standard_error']:.2f}, "
          f"p = {pair['p_value']:.1g}"
        )
      print("| " + " | ".join(cells) + " |")
  print("\n* at the end of its ladder, however wide.")


_LABELS = {  # Of what is named in the figure.
  "F-SAM, 1/8, descent average": "1/8, average of the descent",
  "F-SAM, 1/16": "1/16 of the rows",
  "F-SAM, 1/8": "1/8 of the rows",
  "F-SAM, 1/4": "1/4 of the rows",
  "F-SAM, 1/2": "1/2 of the rows",
  "F-SAM, 1/8, every 2nd step": "1/8, every 2nd step",
  "SAM, 1/8": "SAM, 1/8 of the rows",
}
_ALWAYS_NAMED = ("SGD", "SAM", "F-SAM")


def frontier(points: dict[str, tuple[float, float]]) -> list[str]:
  """The names that none as cheap or cheaper beats, from the cheapest on.

  Args:
    points: gradients a step and accuracy, by name.

  Returns:
    Names in the order of their gradients.
  """
  by_cost = sorted(points, key=lambda name: (points[name][0], -points[name][1]))
  found: list[str] = []
  for name in by_cost:
    if not found or points[name][1] > points[found[-1]][1]:
      found.append(name)
  return found


def _draw_setting(axis, by_arm: dict[str, tuple[float, float, float]], costs):
  """One panel: the frontier in color and named, the others in gray."""
  best = frontier({name: point[:2] for name, point in by_arm.items()})
  place = {name: costs.index(by_arm[name][0]) for name in by_arm}
  for name, (_, accuracy, error) in by_arm.items():
    is_best = name in best
    axis.errorbar(
      place[name],
      accuracy,
      error,
      marker="o",
      markersize=6 if is_best else 3.5,
      color="C0" if is_best else "0.72",
      zorder=3 if is_best else 1,
    )
  axis.plot(
    [place[name] for name in best],
    [by_arm[name][1] for name in best],
    color="C0",
    linewidth=1,
    zorder=2,
  )
  top = max(accuracy + error for _, accuracy, error in by_arm.values())
  bottom = min(accuracy - error for _, accuracy, error in by_arm.values())
  height = max(top - bottom, 0.01)
  # Above all points, a line each, from the last to the first.
  for i, name in enumerate(reversed(best)):
    axis.annotate(
      _LABELS.get(name, name),
      (place[name], by_arm[name][1]),
      (place[name], top + (0.1 + 0.13 * i) * height),
      color="C0",
      fontsize=8,
      ha="left" if place[name] < len(costs) / 2 else "right",
      arrowprops={"arrowstyle": "-", "color": "C0", "linewidth": 0.5},
    )
  named = [name for name in _ALWAYS_NAMED if name in by_arm.keys() - set(best)]
  for name in named:
    # Apart from a name that stands beside a point of about the same height.
    lift = sum(
      np.sign(by_arm[name][1] - by_arm[other][1])
      for other in named
      if place[other] == place[name]
      and abs(by_arm[name][1] - by_arm[other][1]) < 0.08 * height
    )
    axis.annotate(
      name,
      (place[name], by_arm[name][1]),
      (6, 5 * lift),
      textcoords="offset points",
      color="0.35",
      fontsize=8,
      ha="left",
      va="center",
    )
  axis.set_ylim(
    bottom - 0.05 * height, top + (0.12 + 0.13 * len(best)) * height
  )
  axis.set_xlim(-0.4, len(costs) + 0.4)  # Names stand right of the last.
  axis.set_xticks(
    range(len(costs)), [f"{cost:.3g}" for cost in costs], fontsize=7
  )


def plot(rows: list[dict[str, Any]], path: str) -> None:
  """Test accuracy against gradients a step, a panel a setting."""
  from matplotlib import pyplot as plt

  rows = [row for row in rows if row["arm"] in ARMS]
  settings = sorted({setting_of(row) for row in rows})
  cost_of = lambda row: (  # What gates let through differs a little by setting.
    round(row["gradients"], 1)
    if ARMS[row["arm"]].make_step is gated_step
    else row["gradients"]
  )
  costs = sorted({cost_of(row) for row in rows})
  columns = min(2, len(settings))  # As wide as a page is, to be read there.
  lines = -(-len(settings) // columns)
  figure, axes = plt.subplots(
    lines,
    columns,
    figsize=(3.9 * columns, 2.9 * lines),
    squeeze=False,
    layout="constrained",
  )
  for axis, setting in itertools.zip_longest(axes.flat, settings):
    if setting is None:
      axis.set_axis_off()
      continue
    by_arm = {}
    for row in rows:
      if setting_of(row) == setting:
        accuracy = np.array(row["test_accuracy"])
        by_arm[row["arm"]] = (
          cost_of(row),
          accuracy.mean(),
          statistics.standard_error(accuracy) or 0.0,
        )
    _draw_setting(axis, by_arm, costs)
    dataset, model, noise = setting
    axis.set_title(f"{dataset}, {model}, {noise:.0%} wrong labels", fontsize=9)
  figure.supxlabel("gradients a step", fontsize=10)
  figure.supylabel("test accuracy (%)", fontsize=10)
  figure.savefig(path, dpi=130)


def append(row: dict[str, Any], path: pathlib.Path) -> None:
  """Adds a row to the file, and prints it."""
  with path.open("a") as file:
    file.write(json.dumps(row) + "\n")
  print(
    f"{row['dataset']} {row['model']} {row['label_noise']:g} {row['arm']}: "
    f"rho {row['rho']}, {np.mean(row['test_accuracy']):.2f} %, "
    f"{row['seconds']:.0f} s",
    flush=True,
  )


def add_rule(path: pathlib.Path) -> None:
  """Tests the rule in every setting that has F-SAM's row."""
  rows = read(path)
  done = {(setting_of(row), row["arm"]) for row in rows}
  for full in [row for row in rows if row["arm"] == "F-SAM"]:
    for fraction in FRACTIONS:
      if (setting_of(full), rule_name(fraction)) not in done:
        append(run_rule(full, fraction, load(full["dataset"])), path)


def main():
  """Trains what is missing, or reports."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--datasets", nargs="+", choices=EPOCHS, default=["mnist"]
  )
  parser.add_argument(
    "--models", nargs="+", choices=("mlp", "cnn"), default=["mlp"]
  )
  parser.add_argument("--noise", nargs="+", type=float, default=[0.4])
  parser.add_argument(
    "--arms",
    nargs="+",
    choices=ARMS,
    default=list(ARMS),
    metavar="FORM",
    help=f"out of {', '.join(map(repr, ARMS))}",
  )
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("pareto.jsonl")
  )
  parser.add_argument(
    "--quick", action="store_true", help="a few epochs and seeds, to see it run"
  )
  parser.add_argument(
    "--report", action="store_true", help="print the tables of the output"
  )
  parser.add_argument(
    "--rule",
    action="store_true",
    help="test fractions at the rule's radius, where F-SAM is in the output",
  )
  parser.add_argument(
    "--time",
    type=int,
    metavar="ROUNDS",
    help="print the time of each form over that of SGD, and train nothing",
  )
  parser.add_argument("--plot", help="with --report: write the figure here")
  args = parser.parse_args()
  if args.report:
    rows = read(args.output)
    if not rows:
      parser.error(f"--output {args.output} holds nothing to report")
    print_report(rows)
    if args.plot:
      plot(rows, args.plot)
    return
  if args.rule:
    add_rule(args.output)
    return
  if args.time:
    for dataset, model in itertools.product(args.datasets, args.models):
      names = ["SGD", *(name for name in args.arms if name != "SGD")]
      ratios = time_arms(names, load(dataset), model, args.time)
      for name, ratio in ratios.items():
        print(f"{dataset} {model} {name}: {ratio:.2f}", flush=True)
    return
  for dataset, model, noise in itertools.product(
    args.datasets, args.models, args.noise
  ):
    pool = load(dataset)
    for name in args.arms:
      setting = {"dataset": dataset, "model": model, "label_noise": noise}
      done = [
        row
        for row in read(args.output)
        if row["arm"] == name and setting_of(row) == (dataset, model, noise)
      ]
      if done:
        continue
      sgd_rate = None
      if ARMS[name].last < 1:
        sgd = [
          row["learning_rate"]
          for row in read(args.output)
          if row["arm"] == "SGD" and setting_of(row) == (dataset, model, noise)
        ]
        if not sgd:
          parser.error(f"{name} takes SGD's learning rate: train SGD before it")
        (sgd_rate,) = sgd
      row = {
        **setting,
        "arm": name,
        **run_arm(
          ARMS[name],
          pool,
          model,
          noise,
          0.05 if args.quick else 1,
          sgd_rate,
        ),
        "versions": {"jax": jax.__version__},
      }
      append(row, args.output)


if __name__ == "__main__":
  main()

"""F-SAM on real CIFAR with a convolutional network: accuracy, and over rho.

Trains SGD, SAM, F-SAM and cheaper forms with BatchNorm and augmentation on
5,000 images at a setting's fraction of wrong labels. Each form gets the same
search for its learning rate and its radius, on validation rows: twelve points
by one seed, continued where the best is at an end, then the best three by two
more. Its accuracy is that of 16 other seeds, on all test rows, which are looked
at once. In two settings the same for SAM and F-SAM at eight radii.

  python benchmarks/cifar.py --cifar10 PATH [--cifar100 PATH] [--settings ...]
                             [--output cifar.jsonl] [--workers 2] [--quick]
  python benchmarks/cifar.py --report [--output cifar.jsonl]

A setting takes about half an hour of two cores, forty minutes with its curve.
What is in the output already is not trained again, so a run that was ended goes
on.
"""

import argparse
from concurrent import futures
import itertools
import json
import multiprocessing
import os
import pathlib
import time
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pareto

import fsam_optax
from fsam_optax.experiments import data
from fsam_optax.experiments.common import files
from fsam_optax.experiments.common import tables
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.data import label_noise
from fsam_optax.experiments.networks import layers
from fsam_optax.experiments.networks import loss as loss_lib
from fsam_optax.experiments.seeds import search
from fsam_optax.experiments.studies import report

TRAIN, VALIDATION, EPOCHS, BATCH_SIZE = 5000, 5000, 20, 128
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
FIRST_SEED, MORE_SEEDS, TEST_SEEDS = [0], [1, 2], list(range(1000, 1016))
CURVE_SEEDS = TEST_SEEDS[:4]
AUGMENTATION = augmentation.Augmentation(
  flip=True, crop_padding=0, cutout=0, cutout_probability=0.0
)


class Setting(NamedTuple):
  """What is trained on, and by which forms.

  Attributes:
    dataset: ``"cifar10"`` or ``"cifar100"``.
    label_noise: fraction of wrong training labels, in ``[0, 1)``.
    arms: names of :data:`pareto.ARMS`.
    has_curve: whether SAM and F-SAM are trained over the radius, too.
  """

  dataset: str
  label_noise: float
  arms: tuple[str, ...]
  has_curve: bool = True


EIGHTH = "F-SAM, 1/8, descent average"
ARMS = ("F-SAM", "SAM", "SGD", EIGHTH, "random direction")
CHEAP_ARMS = ("F-SAM, 1/2", "F-SAM, at long gradients", "along the momentum")
SETTINGS = {
  "cifar10-40": Setting("cifar10", 0.4, ARMS + CHEAP_ARMS),
  "cifar10-0": Setting("cifar10", 0.0, ARMS, has_curve=False),
  "cifar100-0": Setting("cifar100", 0.0, ARMS),
  "cifar10-20": Setting("cifar10", 0.2, ARMS, has_curve=False),
}
RATES = (0.025, 0.05, 0.1)
RADII = (0.05, 0.1, 0.2, 0.4)  # Times the unit of the form.
SGD_RATES = tuple(0.01 * 1.4**i for i in range(12))  # 0.01 to 0.4.
CURVE = tuple(0.025 * 2**i for i in range(8))  # 0.025 to 3.2.


class Network(nn.Module):
  """Three convolutions of stride 2 with BatchNorm, then a linear layer.

  With 10 classes 33,946 parameters.
  """

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, 32, 32, 3]` to logits `[B, classes]`."""
    norm = layers.batch_norm(train, None)
    for channels in (16, 32, 64):
      x = nn.Conv(channels, (3, 3), 2, padding=1, use_bias=False)(x)
      x = nn.relu(norm()(x))
    return nn.Dense(self.classes)(x.reshape(len(x), -1))


class Point(NamedTuple):
  """What a form is trained with: its learning rate and its radius."""

  learning_rate: float
  rho: float


class Rows(NamedTuple):
  """The images of a seed and their labels, those to train on after the noise.

  Attributes:
    x: shape ``[TRAIN, 32, 32, 3]``, uint8.
    y: shape ``[TRAIN]``, int32.
    x_validation: shape ``[VALIDATION, 32, 32, 3]``, uint8.
    y_validation: shape ``[VALIDATION]``, int32.
  """

  x: np.ndarray
  y: np.ndarray
  x_validation: np.ndarray
  y_validation: np.ndarray


def rows_of(images: data.Images, noise: float, seed: int) -> Rows:
  """Draws the rows of a seed out of the training rows."""
  rng = np.random.default_rng((seed, 19))
  order = rng.permutation(len(images.y_train))
  train, validation = np.split(order[: TRAIN + VALIDATION], [TRAIN])
  y = label_noise.corrupt(
    images.y_train[train], images.classes, noise, "symmetric", rng=rng
  )
  return Rows(
    images.x_train[train],
    y,
    images.x_train[validation],
    images.y_train[validation],
  )


class Trainer:
  """Trains one form at any learning rate and radius; compiled once."""

  def __init__(self, arm: pareto.Arm, images: data.Images, epochs: int):
    """Compiles nothing yet.

    Args:
      arm: the form.
      images: of 32 x 32 pixels, with the published mean of their channels.
      epochs: passes over the training rows.
    """
    self._arm, self._images, self._epochs = arm, images, epochs
    self._network = Network(images.classes)
    self._scale = (
      np.asarray(images.mean, np.float32),
      np.asarray(images.standard_deviation, np.float32),
    )
    self._steps = epochs * (TRAIN // BATCH_SIZE)
    self._step = arm.make_step(
      loss_lib.loss_of(self._network, images.classes, 0.0),
      jit=False,
      skip_nonfinite=False,
      **pareto.step_options(arm, self._steps),
    )
    self._init_jitted = jax.jit(self._init)
    # A call a step: in a loop of XLA's, a CPU takes 24 times as long for a
    # convolution.
    self._step_jitted = jax.jit(self._augment_and_step, donate_argnums=0)
    self._hits_jitted = jax.jit(self._hits)

  def __call__(self, rows: Rows, point: Point, seed: int) -> Any:
    """The state after the last epoch, and whether all of it is finite."""
    point = Point(*(jnp.float32(x) for x in point))
    state = self._init_jitted(jnp.uint32(seed), point)
    x, y = jnp.asarray(rows.x), jnp.asarray(rows.y)
    steps, losses = TRAIN // BATCH_SIZE, []
    for epoch in range(self._epochs):
      order = np.random.default_rng((seed, 20, epoch)).permutation(TRAIN)
      for at in order[: steps * BATCH_SIZE].reshape(steps, BATCH_SIZE):
        state, loss = self._step_jitted(state, x, y, at, point)
        losses.append(loss)
    return state, bool(np.isfinite(losses).all())

  def accuracy(self, state: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Percent of the rows that are classified as labeled."""
    parts = range(0, len(x), 1000)
    hits = [self._hits_jitted(state, x[i : i + 1000]) for i in parts]
    return 100 * float(np.mean(np.concatenate(hits) == y))

  def _transforms(self, point: Point) -> dict[str, Any]:
    """Base optimizer and ascent of a learning rate and a radius."""
    cosine = lambda count: (
      point.learning_rate * 0.5 * (1 + jnp.cos(jnp.pi * count / self._steps))
    )
    make = self._arm.perturbation
    return {
      "tx": optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(cosine, momentum=MOMENTUM),
      ),
      "perturbation": None if make is None else make(point.rho),
    }

  def _init(self, seed, point):
    """By the seed alone, so that the forms are paired."""
    init, rng = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *self._images.x_train.shape[1:]))
    variables = dict(self._network.init(init, images))
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=variables.pop("params"),
      model_state=variables,
      rng=rng,
      **self._transforms(point),
    )
    return state.replace(tx=None, perturbation=None)

  def _augment_and_step(self, state, x, y, at, point):
    """A step on the rows at these positions."""
    state = state.replace(**self._transforms(point))
    # Apart from the key that the step itself takes from the same.
    key = jax.random.fold_in(jax.random.fold_in(state.rng, 2**31), state.step)
    draws = augmentation.draw(AUGMENTATION, key, (BATCH_SIZE, *x.shape[1:]))
    images = augmentation.augment(AUGMENTATION, draws, x[at], *self._scale)
    state, metrics = self._step(state, {"image": images, "label": y[at]})
    return state.replace(tx=None, perturbation=None), metrics["loss"]

  def _hits(self, state, x):
    images = augmentation.normalize(x, *self._scale)
    variables = {"params": state.params, **state.model_state}
    return jnp.argmax(self._network.apply(variables, images), -1)


class Job:
  """One form at one setting: its search, its test, its curve over rho."""

  def __init__(
    self, setting: str, name: str, source: str, output: str, is_quick: bool
  ):
    """Reads the images.

    Args:
      setting: a name of :data:`SETTINGS`.
      name: of the form.
      source: of the images.
      output: file of the rows.
      is_quick: whether to do the least that shows that it runs.
    """
    self._setting, self._name = setting, name
    self._output, self._is_quick = pathlib.Path(output), is_quick
    self._noise = SETTINGS[setting].label_noise
    self._images = data.load(source, otherwise=SETTINGS[setting].dataset)
    if self._images.mean is None:
      raise SystemExit(f"{source} must hold the published files of CIFAR")
    self._trainer = Trainer(
      pareto.ARMS[name], self._images, 1 if is_quick else EPOCHS
    )

  def search_and_test(self) -> None:
    """Chooses learning rate and radius on validation rows, and tests."""
    arm = pareto.ARMS[self._name]
    if arm.perturbation is None:
      rates, radii = list(SGD_RATES), [0.0]
    else:
      rates, radii = list(RATES), [arm.radius_unit * x for x in RADII]
    if self._is_quick:
      rates, radii = rates[:1], radii[:1]
    more = MORE_SEEDS[:1] if self._is_quick else MORE_SEEDS

    def is_wider(best):
      """Whether the best was at an end of either, which then goes on."""
      pairs = (rates, best.learning_rate), (radii, best.rho)
      at_ends = [pair for pair in pairs if search.is_at_an_end(*pair)]
      for pair in at_ends:
        search.continue_beyond(*pair)
      return bool(at_ends)

    first: dict[Point, float] = {}
    while True:
      for pair in itertools.product(rates, radii):
        point = Point(*pair)
        if point not in first:
          (first[point],) = self._run("search", point, FIRST_SEED)
      if is_wider(max(first, key=lambda point: first[point])):
        continue
      ranked = sorted(first, key=lambda point: -first[point])[:3]
      means = {
        point: np.mean([first[point], *self._run("search", point, more)])
        for point in ranked
      }
      best = max(means, key=lambda point: means[point])
      if not is_wider(best):
        break
    self._run("test", best, TEST_SEEDS[:2] if self._is_quick else TEST_SEEDS)

  def curve(self) -> None:
    """Tests at eight radii, at the learning rate that the search chose."""
    (test,) = [
      row
      for row in pareto.read(self._output)
      if (row["setting"], row["arm"], row["phase"])
      == (self._setting, self._name, "test")
    ]
    for rho in CURVE[:1] if self._is_quick else CURVE:
      seeds = CURVE_SEEDS[:1] if self._is_quick else CURVE_SEEDS
      self._run("curve", Point(test["learning_rate"], rho), seeds)

  def _run(self, phase: str, point: Point, seeds: list[int]) -> list[float]:
    """Trains on every seed, or finds that it was done.

    Returns:
      Accuracies on the validation rows in a search, on the test rows else.
    """
    key = {
      "setting": self._setting,
      "arm": self._name,
      "phase": phase,
      "learning_rate": point.learning_rate,
      "rho": point.rho,
      "seeds": seeds,
    }
    for row in pareto.read(self._output):
      if all(row[name] == value for name, value in key.items()):
        return row["accuracy"]
    start, accuracies, gradients, diverged = time.perf_counter(), [], [], 0
    for seed in seeds:
      rows = rows_of(self._images, self._noise, seed)
      state, is_finite = self._trainer(rows, point, seed)
      if phase == "search":
        evaluated = (rows.x_validation, rows.y_validation)
      else:
        evaluated = (self._images.x_test, self._images.y_test)
      accuracies.append(self._trainer.accuracy(state, *evaluated))
      ascent = state.perturbation_state
      gradients.append(pareto.gradients_of(pareto.ARMS[self._name], ascent))
      diverged += not is_finite
    row = key | {
      "accuracy": [round(x, 2) for x in accuracies],
      "gradients": round(float(np.mean(gradients)), 3),
      "diverged": diverged,
      "seconds": round(time.perf_counter() - start),
    }
    # A line in one write: another process appends to the same file.
    with self._output.open("a") as file:
      file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    return row["accuracy"]


def _work(options: dict[str, Any], what: str) -> None:
  """One job in a process of its own, which takes one core."""
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false"
  job = Job(**options)
  if what == "curve":
    job.curve()
  else:
    job.search_and_test()


def train(args: argparse.Namespace) -> None:
  """Trains what is missing, a process a core."""
  sources = {"cifar10": args.cifar10, "cifar100": args.cifar100}
  jobs = []
  for setting in args.settings:
    forms = [(name, "test") for name in SETTINGS[setting].arms]
    if SETTINGS[setting].has_curve:
      forms += [("F-SAM", "curve"), ("SAM", "curve")]
    jobs += [({"setting": setting, "name": name}, what) for name, what in forms]
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(
    args.workers, context, max_tasks_per_child=1
  ) as pool:
    waiting = []
    for options, what in jobs:
      options |= {
        "source": sources[SETTINGS[options["setting"]].dataset],
        "output": str(args.output),
        "is_quick": args.quick,
      }
      waiting.append(pool.submit(_work, options, what))
    for done in futures.as_completed(waiting):
      done.result()


_COMPARED = ("SGD", "SAM", "F-SAM")


def accuracy_table(found: dict[str, Any]) -> dict[str, Any]:
  """The forms at one setting, each at what is best for it.

  Args:
    found: the row of the test of each form.

  Returns:
    Header and rows.
  """
  header = ["form", "gradients", "learning rate", "rho", "test accuracy (%)"]
  rows = []
  gradients = {
    # Those that a gate let through, where one did.
    name: row.get("gradients", pareto.ARMS[name].gradients)
    for name, row in found.items()
  }
  for name in sorted(found, key=lambda name: gradients[name]):
    row = found[name]
    accuracy = row["accuracy"]
    cells = [
      name,
      f"{gradients[name]:g}",
      f"{row['learning_rate']:.3g}",
      f"{row['rho']:.3g}" if row["rho"] else "",
      report.accuracy(accuracy),
    ]
    for other in _COMPARED:
      is_compared = other in found and other != name
      cells.append(
        report.over(accuracy, found[other]["accuracy"]) if is_compared else ""
      )
    rows.append(cells)
  return {"header": header + [f"over {x}" for x in _COMPARED], "rows": rows}


def curve_table(found: dict[tuple[str, float], Any]) -> dict[str, Any]:
  """SAM and F-SAM over the radius at one setting.

  Args:
    found: accuracies by form and radius.

  Returns:
    Header and rows.
  """
  rows = [
    [
      f"{rho:g}",
      report.accuracy(found["SAM", rho]),
      report.accuracy(found["F-SAM", rho]),
      report.over(found["F-SAM", rho], found["SAM", rho]),
    ]
    for rho in CURVE
    if ("SAM", rho) in found and ("F-SAM", rho) in found
  ]
  return {"header": ["rho", "SAM", "F-SAM", "F-SAM over SAM"], "rows": rows}


_PAIRS = (  # Of forms whose differences are shown for all settings at once.
  ("SAM", "SGD"),
  ("F-SAM", "SAM"),
  ("F-SAM", "random direction"),
  (EIGHTH, "F-SAM"),
)


def summary_table(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """What one form has over another, a row a setting.

  Args:
    found: by setting, the row of the test of each form.

  Returns:
    Header and rows; a cell is empty where one of the two was not tested.
  """
  rows = []
  for setting, tests in found.items():
    cells = [title_of(SETTINGS[setting])]
    for one, other in _PAIRS:
      pair = [tests[x]["accuracy"] for x in (one, other) if x in tests]
      cells.append(report.over(*pair) if len(pair) == 2 else "")
    rows.append(cells)
  titles = [f"{one} over {other}" for one, other in _PAIRS]
  return {"header": ["setting", *titles], "rows": rows}


def title_of(setting: Setting) -> str:
  """What stands over the tables of a setting."""
  return f"{setting.dataset}, {setting.label_noise:.0%} wrong labels"


def report_on(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Tables and panels of what was trained.

  Args:
    rows: of the output.

  Returns:
    What a study's JSON holds: a table a setting and one of its curve with a
    panel, then one of all settings.
  """
  written, panels, found = [], [], {}
  for setting in SETTINGS:
    of = [row for row in rows if row["setting"] == setting]
    tests = {row["arm"]: row for row in of if row["phase"] == "test"}
    curves = {
      (row["arm"], row["rho"]): row["accuracy"]
      for row in of
      if row["phase"] == "curve"
    }
    title = title_of(SETTINGS[setting])
    if tests:
      found[setting] = tests
      written.append({"title": title} | accuracy_table(tests))
    if not curves:
      continue
    written.append({"title": f"{title}, over rho"} | curve_table(curves))
    lines = []
    for name in ("SAM", "F-SAM"):
      radii = [rho for rho in CURVE if (name, rho) in curves]
      if radii:
        columns = [curves[name, rho] for rho in radii]
        lines.append(report.line(name, radii, columns))
    panels.append(report.panel("rho", lines) | {"title": title, "is_log": True})
  written.append({"title": "all settings"} | summary_table(found))
  return {
    "study": "cifar",
    "question": "does F-SAM beat SAM with convolutions on real images?",
    "config": {
      "dataset": "CIFAR",
      "model": "three convolutions",
      "label_noise": [setting.label_noise for setting in SETTINGS.values()],
      "train_size": TRAIN,
      "validation_size": VALIDATION,
      "epochs": EPOCHS,
      "batch_size": BATCH_SIZE,
      "momentum": MOMENTUM,
      "weight_decay": WEIGHT_DECAY,
      "lmbda": pareto.LMBDA,
      "search_seeds": [*FIRST_SEED, *MORE_SEEDS],
      "test_seeds": TEST_SEEDS,
      "seeds": CURVE_SEEDS,
      "versions": files.versions(),
    },
    "tables": written,
    "panels": panels,
  }


def write_report(path: pathlib.Path) -> None:
  """Prints the tables, and writes them beside the rows with the figure."""
  found = report_on(pareto.read(path))
  for table in found["tables"]:
    print(f"\n{table['title']}\n")
    print(tables.table(table["header"], table["rows"]))
  files.write_json(found, path.with_suffix(".json"))
  if found["panels"]:
    report.draw(found, path.with_suffix(".png"))


def main():
  """Trains what is missing, or reports."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  for name in ("cifar10", "cifar100"):
    parser.add_argument(
      f"--{name}", metavar="PATH", help="its images, as `train --data` has them"
    )
  parser.add_argument(
    "--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS)
  )
  parser.add_argument("--workers", type=int, default=2, help="processes")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("cifar.jsonl")
  )
  parser.add_argument(
    "--quick", action="store_true", help="an epoch and a seed, to see it run"
  )
  parser.add_argument(
    "--report",
    action="store_true",
    help="print the tables of the output, and write them and the figure beside",
  )
  args = parser.parse_args()
  if args.report:
    if not pareto.read(args.output):
      parser.error(f"--output {args.output} holds nothing to report")
    write_report(args.output)
    return
  for setting in args.settings:
    name = SETTINGS[setting].dataset
    if getattr(args, name) is None:
      parser.error(f"--{name} must be given for {setting}: its images")
  train(args)


if __name__ == "__main__":
  main()

"""What the studies share: arms, their search on validation rows, their test."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import itertools
from typing import Any, NamedTuple, Optional

import jax
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import data
from fsam_optax.experiments import models
from fsam_optax.experiments import report
from fsam_optax.experiments import training

LMBDA = 0.9
RATES = (0.0075, 0.015, 0.03)
RADII = (0.15, 0.25, 0.4, 0.6)
# Of SGD alone, as many as the points of the others' grids.
SGD_RATES = tuple(0.0005 * 1.5**i for i in range(12))
_RUNS_AT_ONCE = 32
_MOST_EXTENSIONS = 4

Progress = Callable[[str, int], Callable[[], None]]


class Context(NamedTuple):
  """What a study works on.

  Attributes:
    pool: the data set.
    model: ``"mlp"`` or ``"cnn"``.
    label_noise: share of the training labels that are moved.
    epochs: passes over the training rows.
    batch_size: rows a step.
    search_seeds: to choose learning rates and radii by, on validation rows.
    seeds: to report; none of them chose anything.
    is_quick: whether to do the least that shows that the study runs.
    progress: opens a progress bar of a title and a number of steps.
  """

  pool: data.Pool
  model: str
  label_noise: float
  epochs: int
  batch_size: int
  search_seeds: Sequence[int]
  seeds: Sequence[int]
  is_quick: bool
  progress: Progress


class Arm(NamedTuple):
  """A way to train, and where its learning rate and radius are searched.

  Attributes:
    perturbation: from a radius; None for SGD.
    radii: to try with each learning rate; one that says nothing for SGD.
    rates: learning rates to try.
  """

  perturbation: Optional[Callable[[Any], optax.GradientTransformation]]
  radii: tuple[float, ...] = RADII
  rates: tuple[float, ...] = RATES


def fsam(rho: Any, sigma: float = 1.0, lmbda: float = LMBDA):
  """F-SAM's ascent."""
  return fsam_optax.friendly_perturbation(rho, sigma, lmbda)


SGD = Arm(None, radii=(0.0,), rates=SGD_RATES)
SAM = Arm(fsam_optax.sam_perturbation)
FSAM = Arm(fsam, radii=(0.3, 0.45, 0.65, 0.95))


class Runs(NamedTuple):
  """What came of ``R`` runs.

  Attributes:
    test_accuracy: percent, shape ``[R]``, float64; NaN of a run that diverged.
    validation_accuracy: as above, but what a run classifies though it diverged,
      so that a search stays clear of it.
    diverged: shape ``[R]``, bool.
    params: leaves of shape ``[R, ...]``.
  """

  test_accuracy: np.ndarray
  validation_accuracy: np.ndarray
  diverged: np.ndarray
  params: Any


class Best(NamedTuple):
  """The best point of an arm's grid, by mean validation accuracy.

  Attributes:
    rate: learning rate.
    rho: radius, 0 for SGD.
    grid: of each point its rate, radius and mean validation accuracy.
    on_edge: which of the two lie at an end of their values.
  """

  rate: float
  rho: float
  grid: list[list[float]]
  on_edge: list[str]


class Bench:
  """Trains the arms of a study; each is compiled once."""

  def __init__(
    self, context: Context, arms: Mapping[str, Arm], **trainer_options: Any
  ):
    """Prepares to train.

    Args:
      context: what to train on.
      arms: by name.
      **trainer_options: of :class:`training.Trainer`.
    """
    self.context = context
    self.arms = dict(arms)
    self._at_once = 2 if context.is_quick else _RUNS_AT_ONCE
    self.trainer = training.Trainer(
      models.create(context.model, context.pool.classes),
      context.pool,
      sigma=1.0,
      lmbda=LMBDA,
      epochs=context.epochs,
      batch_size=context.batch_size,
      optimize=not context.is_quick,
      perturbations={
        name: arm.perturbation
        for name, arm in arms.items()
        if arm.perturbation is not None
      },
      **trainer_options,
    )

  def splits(self, seeds: Sequence[int], noise: Optional[float] = None):
    """The splits of some seeds."""
    if noise is None:
      noise = self.context.label_noise
    return data.split(self.context.pool, list(seeds), noise)

  def run(
    self,
    name: str,
    points: Sequence[tuple[float, float]],
    seeds: Sequence[int],
    noise: Optional[float] = None,
  ) -> Runs:
    """Trains an arm on every seed at every point of rate and radius.

    Args:
      name: of the arm.
      points: learning rate and radius.
      seeds: of the splits, initialisations and batches.
      noise: share of the labels that are moved; None for the study's.

    Returns:
      The runs, those of the first point first.
    """
    arm = self.arms[name]
    optimizer = "sgd" if arm.perturbation is None else name
    splits = self.splits(seeds, noise)
    number = len(points) * len(seeds)
    at = np.arange(-(-number // self._at_once) * self._at_once) % number
    found = []
    parts = at.reshape(-1, self._at_once)
    tick = self.context.progress(name, len(parts) * self.context.epochs)
    for part in parts:
      rates, radii = np.array([points[i // len(seeds)] for i in part]).T
      rows = part % len(seeds)
      own = jax.tree.map(lambda x, rows=rows: x[rows], splits)
      outcome = self.trainer(
        optimizer, own, rates, radii, with_curve=False, on_epoch=tick
      )
      found.append(
        Runs(
          np.where(outcome.diverged, np.nan, outcome.test_accuracy),
          outcome.validation_accuracy,
          outcome.diverged,
          jax.tree.map(np.asarray, outcome.params),
        )
      )
    return jax.tree.map(lambda *x: np.concatenate(x)[:number], *found)

  def search(self, name: str, noise: Optional[float] = None) -> Best:
    """Chooses learning rate and radius on validation rows.

    Every arm starts from as many points. Where the best lies at an end of its
    values, they are continued beyond it, at most a few times.

    Args:
      name: of the arm.
      noise: see :meth:`run`.

    Returns:
      The best point.
    """
    arm = self.arms[name]
    rates, radii = list(arm.rates), list(arm.radii)
    if self.context.is_quick:
      rates, radii = rates[:1], radii[:2]
    means: dict[tuple[float, float], float] = {}
    for _ in range(1 if self.context.is_quick else _MOST_EXTENSIONS + 1):
      points = [
        point for point in itertools.product(rates, radii) if point not in means
      ]
      runs = self.run(name, points, self.context.search_seeds, noise)
      found = runs.validation_accuracy.reshape(len(points), -1).mean(axis=1)
      means |= zip(points, found.tolist(), strict=True)
      rate, rho = max(means, key=lambda point: means[point])
      on_edge = []
      for what, value, values in (
        ("learning rate", rate, rates),
        ("rho", rho, radii),
      ):
        if len(values) > 1 and value in (values[0], values[-1]):
          on_edge.append(what)
          _continue_beyond(values, value)
      if not on_edge:
        break
    grid = [[*point, mean] for point, mean in means.items()]
    return Best(rate, rho, grid, on_edge)

  def test(
    self, name: str, best: Best, noise: Optional[float] = None
  ) -> tuple[Runs, dict[str, Any]]:
    """Trains an arm at its best point on the seeds to report.

    Args:
      name: of the arm.
      best: what :meth:`search` found.
      noise: see :meth:`run`.

    Returns:
      The runs, and what the JSON says about them.
    """
    runs = self.run(name, [(best.rate, best.rho)], self.context.seeds, noise)
    summary = {
      "learning_rate": best.rate,
      "rho": best.rho if self.arms[name].perturbation else None,
      "grid": best.grid,
      "on_edge": best.on_edge,
      "test_accuracy": runs.test_accuracy.tolist(),
      "diverged": int(runs.diverged.sum()),
    }
    return runs, summary

  def loss_and_data(self, runs: Runs, run: int, seeds: Sequence[int]):
    """Loss, parameters and training rows of one run, for the measures.

    Args:
      runs: of one point.
      run: which.
      seeds: of the runs.

    Returns:
      ``loss_fn, params, data``, the same function for every run.
    """
    splits = self.splits([seeds[run]])
    params = jax.tree.map(lambda x: x[run], runs.params)
    return self.trainer.loss, params, self.trainer.training_data(splits, 0)


def _continue_beyond(values: list[float], end: float) -> None:
  """Adds the next value of a geometric sequence at one of its ends."""
  if end == values[0]:
    values.insert(0, values[0] ** 2 / values[1])
  else:
    values.append(values[-1] ** 2 / values[-2])


def difference(first: Any, second: Any) -> tuple[Optional[float], ...]:
  """Mean of paired differences, its standard error and p-value.

  Args:
    first: one value a seed, NaN where its run diverged.
    second: as many.

  Returns:
    The three, over the seeds where neither run diverged; None where they are
    not defined.
  """
  first, second = np.asarray(first, float), np.asarray(second, float)
  both = np.isfinite(first) & np.isfinite(second)
  if not both.any():
    return None, None, None
  pair = {"fsam": first[both], "sam": second[both]}
  found = report.paired(pair)["fsam-sam"]
  return found["mean"], found["standard_error"], found["p_value"]


def signed(values: tuple[Optional[float], ...]) -> str:
  """A paired difference as a table prints it."""
  mean, error, p_value = values
  if mean is None:
    return "-"
  text = report.with_error(mean, error, signed=True)
  return text if p_value is None else f"{text}, p {p_value:.1g}"


def mean_and_error(values: Any) -> tuple[Optional[float], Optional[float]]:
  """Mean and standard error of what is finite; None where nothing is."""
  values = np.asarray(values, np.float64)
  values = values[np.isfinite(values)]
  if not len(values):
    return None, None
  return float(values.mean()), report.standard_error(values)


def accuracy(values: Any) -> str:
  """Mean ± standard error in percent, and how many runs it leaves out."""
  mean, error = mean_and_error(values)
  diverged = int(np.sum(~np.isfinite(np.asarray(values, np.float64))))
  text = "-" if mean is None else report.with_error(mean, error)
  return f"{text} ({diverged} diverged)" if diverged else text


def number(values: Any, digits: int = 3) -> str:
  """Mean ± standard error, or a dash where nothing is finite."""
  mean, error = mean_and_error(values)
  if mean is None:
    return "-"
  text = f"{mean:.{digits}g}"
  if error is None:
    return text
  return f"{text} ± " + (f"{error:.0f}" if error >= 10 else f"{error:.1g}")


def series(label: str, x: Sequence[Any], columns: Any) -> dict[str, Any]:
  """A line of a figure, with a gap where a value is not finite.

  Args:
    label: its name.
    x: where its points stand.
    columns: the values at each.

  Returns:
    What a panel holds.
  """
  pairs = [
    mean_and_error(values) if np.all(np.isfinite(values)) else (None, None)
    for values in columns
  ]
  return {
    "label": label,
    "x": list(x),
    "mean": [mean for mean, _ in pairs],
    "error": [error for _, error in pairs],
  }

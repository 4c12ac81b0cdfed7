"""The laboratory: what a study works on, and its arms searched and tested."""

import dataclasses
import time
from typing import Any, Callable, Mapping, Optional, Sequence

from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np

from fsam_optax.experiments.common import files
from fsam_optax.experiments.common.progress import Advance
from fsam_optax.experiments.lab import arms as arms_lib
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import splits as splits_lib
from fsam_optax.experiments.lab import trainer as trainer_lib
from fsam_optax.experiments.lab.store import Row
from fsam_optax.experiments.lab.store import Store


@dataclasses.dataclass(frozen=True)
class Lab:
  """Trains, searches and tests arms; what it did is in the store.

  Attributes:
    pool: the data set.
    model: name of the network.
    network: makes the network for a number of classes.
    label_noise: fraction of the training labels that are replaced.
    label_noise_kind: by what they are replaced.
    epochs: passes over the training rows.
    batch_size: rows a step.
    arms: to train, by name.
    best: of each optimizer, around which searches begin.
    search_seeds: to choose hyperparameters by, on validation rows.
    seeds: to report; none of them chose anything.
    more_seeds: that the best points of a search are trained on as well.
    is_quick: whether to do the least that shows that it runs.
    store: of the rows.
    progress: opens a progress bar of a title and a number of steps.
    described: what the arms have in common, for the rows.
    sources: of images that a study asks for, by the names of their data sets.
    trainer_options: of :class:`~fsam_optax.experiments.lab.trainer.Trainer`.
    at_once: runs that train together. Few, whose arrays fit a processor's
      cache: of 4 the small CNN takes .4 of the time a run that 32 take.
  """

  pool: splits_lib.Pool
  model: str
  network: Callable[[int], nn.Module]
  label_noise: float
  label_noise_kind: str
  epochs: int
  batch_size: int
  arms: Mapping[str, arms_lib.Arm]
  best: Mapping[str, search.Point]
  search_seeds: Sequence[int]
  seeds: Sequence[int]
  more_seeds: Sequence[int] = ()
  is_quick: bool = False
  store: Store = dataclasses.field(default_factory=Store)
  progress: Callable[[str, int], Advance] = lambda title, total: lambda: None
  described: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sources: Mapping[str, Optional[str]] = dataclasses.field(default_factory=dict)
  trainer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  at_once: int = 4
  _trainers: dict[Any, Any] = dataclasses.field(default_factory=dict)

  def at(self, **changes: Any) -> "Lab":
    """The same at another setting; what is compiled for one is kept for it."""
    if self.is_quick:  # By the fewest seeds, whichever a study has.
      changes = {k: v for k, v in changes.items() if not k.endswith("seeds")}
    return dataclasses.replace(self, **changes)

  @property
  def trainer(self) -> trainer_lib.Trainer:
    """Of all arms; each is compiled once."""
    options = sorted(self.trainer_options.items())
    pool = (self.pool.name, self.pool.fingerprint, self.pool.train_size)
    key = (*pool, self.model, self.batch_size, self.epochs, *options)
    key += tuple((name, id(arm)) for name, arm in self.arms.items())
    if key not in self._trainers:
      self._trainers[key] = trainer_lib.Trainer(
        self.network(self.pool.classes),
        self.pool,
        self.arms,
        epochs=self.epochs,
        batch_size=self.batch_size,
        optimize=not self.is_quick,
        **self.trainer_options,
      )
    return self._trainers[key]

  def splits(self, seeds: Sequence[int]) -> splits_lib.Splits:
    """One split a seed."""
    return splits_lib.split(
      self.pool, seeds, self.label_noise, self.label_noise_kind
    )

  def setting(self) -> Row:
    """What every row says of how it was trained, beside its arm."""
    return {
      "dataset": self.pool.name,
      "data": self.pool.fingerprint,
      "input_shape": list(self.pool.x.shape[1:]),
      "model": self.model,
      "label_noise": self.label_noise,
      "label_noise_kind": self.label_noise_kind,
      "epochs": self.epochs,
      "batch_size": self.batch_size,
      **self.described,
    }

  def config(self) -> dict[str, Any]:
    """What the JSON says about how its numbers came to be."""
    pool = self.pool
    return {
      **self.setting(),
      "train_size": pool.train_size,
      "validation_size": pool.validation_size,
      "test_size": pool.test_size,
      "classes": pool.classes,
      "momentum": arms_lib.MOMENTUM,
      "learning_rate_schedule": "cosine to 0",
      "search_seeds": [*self.search_seeds, *self.more_seeds],
      "seeds": list(self.seeds),
      "accuracy_unit": "percent",
      "versions": files.versions(),
      "device": jax.devices()[0].device_kind,
    }

  def choose(self, name: str, grid: search.Grid) -> search.Found:
    """Searches an arm's hyperparameters on validation rows."""
    extensions = search.MOST_EXTENSIONS
    if self.is_quick:
      grid = search.Grid(grid[0][:1], grid[1][:2], grid[2][:1])
      extensions = 0
    advance = self.progress(f"{name}, search", len(grid.points()))

    def run(point: search.Point, seeds: Sequence[int]) -> Row:
      row = self.run(name, point, seeds, "search")
      advance()
      return row

    return search.search(
      run, grid, self.search_seeds, self.more_seeds, extensions
    )

  def test(self, name: str) -> Row:
    """An arm trained at its best point on the seeds to report, now or before.

    Unless few seeds chose that point, the arm is trained as well at the points
    that other seeds may have chosen, for an error that includes the search.
    """
    key = {"phase": "test", "arm": name, **self.setting()}
    key["seeds"] = list(self.seeds)
    if row := self.store.find(key):
      return row
    found = self.choose(name, self.arms[name].grid(self.best))
    run = lambda point: self.run(name, point, self.seeds, "candidate")
    means = found.accuracy.mean(axis=1).tolist()
    row = {
      **run(found.best),
      **key,
      "rho": found.best.rho if self.arms[name].perturbation else None,
      "grid": [[*x, y] for x, y in zip(found.points, means, strict=True)],
      "on_edge": found.on_edge,
    }
    if not self.more_seeds:
      row["candidates"] = [
        {
          **found.points[i]._asdict(),
          "validation_accuracy": found.accuracy[i].tolist(),
          "test_accuracy": run(found.points[i])["test_accuracy"],
        }
        for i in found.candidates()
      ]
    return self.store.append(row)

  def run(
    self,
    name: str,
    point: search.Point,
    seeds: Sequence[int],
    phase: str,
    *,
    measure: Optional[Callable[[Any, jax.Array], Mapping[str, Any]]] = None,
  ) -> Row:
    """An arm trained on some seeds at a point, now or before.

    Of a run that diverged the row has None for the test accuracy, and for the
    validation accuracy 0: a search does not choose what a NaN classifies.

    Args:
      name: of the arm.
      point: to train at.
      seeds: one for each run.
      phase: what for; the row of a ``"search"`` says nothing of test rows.
      measure: from the ``(loss_fn, params, data)`` of a run and a key to values
        by name. The row has those of the runs that did not diverge.
    """
    key = {"phase": phase, "arm": name, **self.setting(), **point._asdict()}
    key["seeds"] = list(seeds)
    if row := self.store.find(key):
      return row
    start = time.perf_counter()
    outcome = self._train(name, point, seeds, phase)
    runs = zip(outcome.test_accuracy, outcome.diverged, strict=True)
    row = key | {
      "validation_accuracy": np.where(
        outcome.diverged, 0.0, outcome.validation_accuracy
      ).tolist(),
      "test_accuracy": [None if x else float(y) for y, x in runs],
      "diverged": int(outcome.diverged.sum()),
      "seconds": round(time.perf_counter() - start, 1),
      **self.arms[name].watch(outcome.perturbation_state),
    }
    if phase == "search":
      del row["test_accuracy"]
    if outcome.curve.size:
      row["curve"] = outcome.curve.tolist()
    if self.arms[name].gradients is not None:
      row.setdefault("gradients", self.arms[name].gradients)
    if measure is not None:
      row["measures"] = self._measures(name, outcome, seeds, measure)
    return self.store.append(row)

  def _train(self, name, point, seeds, phase) -> trainer_lib.Outcome:
    """A few runs at a time, the last of which repeat the first."""
    number, at_once = len(seeds), 2 if self.is_quick else self.at_once
    padded = np.arange(-(-number // at_once) * at_once) % number
    parts, splits = padded.reshape(-1, at_once), self.splits(seeds)
    advance = lambda: None
    if phase != "search":  # Which has a bar of its points.
      total = len(parts) * self.trainer.epochs_of(name)
      advance = self.progress(name, total)
    found = [
      self.trainer(
        name,
        jax.tree.map(lambda x, rows=rows: x[rows], splits),
        *(np.full(at_once, value) for value in point),
        on_epoch=advance,
      )
      for rows in parts
    ]

    def join(*x):
      of = np if isinstance(x[0], np.ndarray) else jnp
      return of.concatenate(x)[:number]

    return jax.tree.map(join, *found)

  def _measures(self, name, outcome, seeds, measure) -> dict[str, list[Any]]:
    splits, found = self.splits(seeds), {}
    runs = np.flatnonzero(~outcome.diverged).tolist()
    advance = self.progress(f"{name}, measures", len(runs))
    for run in runs:
      own = jax.tree.map(lambda x, run=run: x[run], outcome.params)
      model = self.trainer.loss, own, self.trainer.training_data(splits, run)
      for what, value in measure(model, jax.random.key(run)).items():
        found.setdefault(what, []).append(value)
      advance()
    return found

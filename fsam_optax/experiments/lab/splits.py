"""The rows that each seed trains, validates and tests on, and their labels."""

from typing import NamedTuple, Optional, Sequence

import numpy as np

from fsam_optax.experiments import data
from fsam_optax.experiments.data import label_noise
from fsam_optax.experiments.data.images import moments


class Pool(NamedTuple):
  """All rows of a data set, and how many of them each split gets.

  Attributes:
    name: of the data set, or its path.
    x: inputs, shape ``[N, ...]``, float32.
    y: clean labels, shape ``[N]``, int32, in ``[0, classes)``.
    classes: number of classes.
    train_size: rows to train on.
    validation_size: rows to choose hyperparameters by.
    test_size: rows that the final model is tested on.
    fixed_test: whether the test rows are always the last ``test_size`` ones;
      otherwise every seed draws its own.
    noise_targets: see :class:`fsam_optax.experiments.data.Images`.
    fingerprint: of the rows of a file; empty where the name says which they
      are.
    stream: of the random numbers of a seed; empty for the seed's own.
    scale: published mean and standard deviation of each channel; None for those
      of the training rows of each seed.
  """

  name: str
  x: np.ndarray
  y: np.ndarray
  classes: int
  train_size: int
  validation_size: int
  test_size: int
  fixed_test: bool
  noise_targets: Optional[np.ndarray] = None
  fingerprint: str = ""
  stream: tuple[int, ...] = ()
  scale: Optional[tuple[np.ndarray, np.ndarray]] = None


class Splits(NamedTuple):
  """One split of a pool for each of ``S`` seeds.

  Attributes:
    seed: shape ``[S]``, uint32.
    train_rows: rows of the pool, shape ``[S, train_size]``, int32.
    train_labels: their labels after the noise, same shape, int32.
    validation_rows: shape ``[S, validation_size]``, int32.
    test_rows: shape ``[S, test_size]``, int32.
    mean: of the training rows, float32, shape ``[S, features]`` of vectors and
      ``[S, C]`` of images.
    standard_deviation: of the same shape; 1 where the training rows are
      constant.
  """

  seed: np.ndarray
  train_rows: np.ndarray
  train_labels: np.ndarray
  validation_rows: np.ndarray
  test_rows: np.ndarray
  mean: np.ndarray
  standard_deviation: np.ndarray


def load(source: str, image_size: Optional[int] = None) -> Pool:
  """Reads a data set as one pool of rows.

  Where a source has no test rows of its own, each seed draws them.
  """
  images = data.load(source, image_size=image_size)
  x = np.concatenate([images.x_train, images.x_test]).astype(np.float32)
  y = np.concatenate([images.y_train, images.y_test])
  rows = data.REGISTRY[data.name_of(source)].seed_rows
  if rows is None:
    train, test = len(images.y_train), len(images.y_test)
    validation = train // 5
    if not validation:
      raise data.DataError(
        "must hold 5 training rows at least, a fifth of which validate, got "
        f"{train}"
      )
    sizes = (train - validation, validation, test)
  else:
    sizes = (*rows, len(y) - sum(rows))
  if images.source_rows is not None:
    # In the order of the source, of which the rows of a seed are a permutation.
    place = np.argsort(images.source_rows)
    x, y = x[place], y[place]
  return Pool(
    images.name,
    x,
    y,
    images.classes,
    *sizes,
    fixed_test=rows is None,
    noise_targets=images.noise_targets,
    fingerprint="" if rows else images.fingerprint()[:8],
  )


def split(
  pool: Pool, seeds: Sequence[int], noise: float, kind: str = "symmetric"
) -> Splits:
  """Splits a pool once for each seed and moves labels of the training rows."""
  splits = [_split_once(pool, seed, noise, kind) for seed in seeds]
  return Splits(*map(np.stack, zip(*splits, strict=True)))


def _split_once(pool: Pool, seed: int, noise: float, kind: str) -> Splits:
  rng = np.random.default_rng((seed, *pool.stream))
  number = len(pool.y) - pool.test_size * pool.fixed_test
  order = rng.permutation(number).astype(np.int32)
  ends = np.cumsum([pool.train_size, pool.validation_size])
  train_rows, validation_rows, test_rows = np.split(order, ends)
  if pool.fixed_test:
    test_rows = np.arange(number, len(pool.y))
  labels = label_noise.corrupt(
    pool.y[train_rows].astype(np.int32),
    pool.classes,
    noise,
    kind,
    rng=rng,
    targets=pool.noise_targets,
  )
  # Of the training rows alone: the others must not leak into them.
  scale = pool.scale or moments(pool.x[train_rows])
  mean, deviation = (np.asarray(x, np.float32) for x in scale)
  return Splits(
    seed=np.asarray(seed, np.uint32),
    train_rows=train_rows,
    train_labels=labels,
    validation_rows=validation_rows,
    test_rows=test_rows.astype(np.int32),
    mean=mean,
    standard_deviation=deviation,
  )

"""The programs of a run: its first state, its step and its evaluation."""

import functools
import math
from typing import Any, Callable, NamedTuple, Optional, cast

from flax import struct
import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

from fsam_optax._parallel import BatchFeeder
from fsam_optax._parallel import host_metrics
from fsam_optax._parallel import jit_step
from fsam_optax._parallel import state_shardings
from fsam_optax._perturbation import friendly_perturbation
from fsam_optax._perturbation import sam_perturbation
from fsam_optax._train_step import TrainState
from fsam_optax._train_step import make_train_step
from fsam_optax.experiments import augmentation
from fsam_optax.experiments import layers
from fsam_optax.experiments import resnet
from fsam_optax.experiments import vgg
from fsam_optax.experiments import wide_resnet
from fsam_optax.experiments.paper_recipes import Config

MEANS = (
  "loss",
  "accuracy",
  "perturbed_loss",
  "sharpness",
  "gradient_norm",
  "perturbation_norm",
)


class Progress(struct.PyTreeNode):
  """All that a run is, and so all that a checkpoint has to hold.

  Attributes:
    state: the train state; a skipped step leaves it as it was.
    batches: number of batches that were taken, shape ``[]``, int32.
    sums: over the steps of this epoch that were not skipped, weighted by their
      rows, each of shape ``[]``: those of :data:`MEANS` and ``rows``.
    skipped: steps of this epoch that were skipped, shape ``[]``, int32.
    skipped_in_a_row: steps up to now, shape ``[]``, int32.
  """

  state: TrainState
  batches: jax.Array
  sums: dict[str, jax.Array]
  skipped: jax.Array
  skipped_in_a_row: jax.Array


class Shapes(NamedTuple):
  """What the programs are compiled for.

  Attributes:
    image: height, width and channels.
    dtype: of the images, before they are normalised.
    classes: number of classes.
    steps_an_epoch: number of batches.
    last_size: rows of the last batch of an epoch, 0 where it is a whole one.
  """

  image: tuple[int, ...]
  dtype: Any
  classes: int
  steps_an_epoch: int
  last_size: int


def network_of(config: Config, classes: int) -> Any:
  """The model, with the initialisation of the authors' code."""
  dtype = jnp.dtype(config.dtype)
  if config.model == "resnet":
    return resnet.ResNet(
      classes,
      width=config.width,
      blocks=((config.depth - 2) // 8,) * 4,
      dtype=dtype,
      kernel_init=layers.TORCH,
    )
  if config.model == "vgg":
    return vgg.VGG(classes, config.depth, config.width, config.dropout, dtype)
  return wide_resnet.WideResNet(classes, config.depth, config.width, dtype)


def check_depth(model: str, depth: int) -> Optional[str]:
  """What the depth of a model must be, or None where it is so."""
  if model == "resnet" and (depth < 10 or (depth - 2) % 8):
    return "8 n + 2, such as 10 or 18, for resnet"
  if model == "vgg" and depth not in vgg.STAGES:
    return f"one of {', '.join(map(str, vgg.STAGES))} for vgg"
  if model == "wide_resnet" and (depth < 10 or (depth - 4) % 6):
    return "6 n + 4, such as 10, 16 or 28, for wide_resnet"
  return None


def learning_rate_of(config: Config, steps: int) -> optax.Schedule:
  """The learning rate at each step: a cosine from the first to 0 after all."""
  return optax.cosine_decay_schedule(config.learning_rate, steps)


def perturbation_of(config: Config) -> Optional[optax.GradientTransformation]:
  """The ascent of the optimizer, None for SGD."""
  if config.optimizer == "sgd":
    return None
  if config.optimizer == "sam":
    return sam_perturbation(config.rho, adaptive=config.adaptive)
  return friendly_perturbation(
    config.rho, config.sigma, config.lmbda, adaptive=config.adaptive
  )


class Program:
  """The functions of a run on the devices of a mesh."""

  def __init__(
    self,
    config: Config,
    shapes: Shapes,
    mesh: Mesh,
    *,
    mean: Any,
    deviation: Any,
  ) -> None:
    """Builds the functions; nothing is compiled yet.

    Args:
      config: the configuration.
      shapes: of the data.
      mesh: the devices, with an axis ``batch``.
      mean: of each channel, shape ``[C]``.
      deviation: as the mean.
    """
    self.config, self.shapes, self.mesh = config, shapes, mesh
    self.steps = config.epochs * shapes.steps_an_epoch
    self._network = network_of(config, shapes.classes)
    # Once: a state of another one would not fit the compiled step.
    self._tx = optax.chain(
      optax.add_decayed_weights(config.weight_decay),
      optax.sgd(
        learning_rate_of(config, self.steps),
        momentum=config.momentum,
        nesterov=config.nesterov,
      ),
    )
    self._perturbation = perturbation_of(config)
    dtype = jnp.float64 if config.dtype == "float64" else jnp.float32
    self._dtype = dtype
    constant = lambda x: np.broadcast_to(
      np.asarray(x, dtype), shapes.image[-1:]
    )
    self._mean, self._deviation = constant(mean), constant(deviation)
    self._augmentation = augmentation.Augmentation(
      config.flip,
      config.crop_padding,
      config.cutout,
      config.cutout_probability,
    )
    has_ascent = config.optimizer != "sgd"
    self._train_step = make_train_step(
      self._loss,
      num_microbatches=config.microbatches,
      ascent_fraction=config.ascent_fraction if has_ascent else 1.0,
      ema_gradient=config.ema_gradient if has_ascent else "ascent",
      jit=False,
    )

  def create(self, seed: int) -> Progress:
    """The progress of a run before its first step, not on the mesh yet."""
    init, dropout = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *self.shapes.image), self._dtype)
    # One program, not one for every layer.
    variables = dict(
      jax.jit(functools.partial(self._network.init, train=False))(init, images)
    )
    variables = jax.tree.map(lambda x: x.astype(self._dtype), variables)
    state = TrainState.create(
      apply_fn=None,
      params=variables.pop("params"),
      tx=self._tx,
      perturbation=self._perturbation,
      model_state=variables,
      rng=dropout,
    )
    zero = lambda dtype: jnp.zeros([], dtype)
    return Progress(
      state=state,
      batches=zero(jnp.int32),
      sums={name: zero(self._dtype) for name in (*MEANS, "rows")},
      skipped=zero(jnp.int32),
      skipped_in_a_row=zero(jnp.int32),
    )

  def abstract(self) -> Progress:
    """Shapes, dtypes and shardings of the progress; nothing is computed."""
    shapes = jax.eval_shape(lambda: self.create(0))
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      shapes,
      state_shardings(shapes, self.mesh),
    )

  def abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch of all devices together."""
    sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
    leaf = lambda shape, dtype: jax.ShapeDtypeStruct(
      shape, dtype, sharding=sharding
    )
    return {
      "image": leaf((rows, *self.shapes.image), self.shapes.dtype),
      "label": leaf((rows,), jnp.int32),
    }

  def lower_step(self, rows: int) -> Any:
    """The step for a batch of so many rows, to be compiled."""
    progress = self.abstract()
    return jit_step(cast(Any, self.step), progress).lower(
      progress, self.abstract_batch(rows)
    )

  def step(
    self, progress: Progress, batch: dict[str, jax.Array]
  ) -> tuple[Progress, dict[str, jax.Array]]:
    """Augments a batch, takes the step and counts; a pure function."""
    state = progress.state
    # Not of the step that the state counts: it stands still at a skipped one.
    assert state.rng is not None
    key = jax.random.fold_in(
      jax.random.fold_in(state.rng, 2**32 - 1), progress.batches
    )
    draws = augmentation.draw(self._augmentation, key, batch["image"].shape)
    images = augmentation.augment(
      self._augmentation, draws, batch["image"], self._mean, self._deviation
    )
    state, metrics = self._train_step(
      state, {"image": images, "label": batch["label"]}
    )
    is_first = progress.batches % self.shapes.steps_an_epoch == 0
    is_taken = metrics["skipped"] == 0
    rows = len(batch["label"])
    add = lambda total, value: (
      jnp.where(is_first, 0, total)
      + jnp.where(is_taken, rows * value, 0).astype(total.dtype)
    )
    sums = {
      name: add(total, 1.0 if name == "rows" else metrics[name])
      for name, total in progress.sums.items()
    }
    skipped = metrics["skipped"]
    return (
      Progress(
        state=state,
        batches=progress.batches + 1,
        sums=sums,
        skipped=jnp.where(is_first, 0, progress.skipped) + skipped,
        skipped_in_a_row=jnp.where(
          is_taken, 0, progress.skipped_in_a_row + skipped
        ),
      ),
      metrics,
    )

  def evaluator(
    self, rows: int
  ) -> Callable[[TrainState, np.ndarray, np.ndarray], dict[str, float]]:
    """Builds the evaluation, which takes so many rows at a time.

    Args:
      rows: of all devices together.

    Returns:
      A function of a state, all images and all labels, which each process has.
      It returns ``loss`` and ``accuracy``, the latter in percent.
    """
    add = jax.jit(
      self._evaluate, out_shardings=NamedSharding(self.mesh, PartitionSpec())
    )
    feed = BatchFeeder(self.mesh)
    index, count = jax.process_index(), jax.process_count()
    mine = slice(index * rows // count, (index + 1) * rows // count)

    def evaluate(state, images, labels):
      totals = []
      for start in range(0, len(labels), rows):
        x, y = images[start : start + rows], labels[start : start + rows]
        short = rows - len(y)
        batch = {
          "image": np.pad(x, ((0, short), (0, 0), (0, 0), (0, 0)))[mine],
          "label": np.pad(y, (0, short))[mine],
          "is_row": (np.arange(rows) < len(y))[mine],
        }
        # Waits: on the CPU, collectives of many steps in flight can deadlock.
        totals.append(
          host_metrics(add(state.params, state.model_state, feed(batch)))
        )
      total = {name: sum(t[name] for t in totals) for name in totals[0]}
      return {
        "loss": total["loss"] / len(labels),
        "accuracy": 100 * total["hits"] / len(labels),
      }

    return evaluate

  def _loss(self, params, model_state, batch, rng):
    logits, model_state = self._network.apply(
      {"params": params, **model_state},
      batch["image"],
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": rng},
    )
    labels = batch["label"]
    if smoothing := self.config.label_smoothing:
      one_hot = jax.nn.one_hot(labels, self.shapes.classes, dtype=logits.dtype)
      losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(one_hot, smoothing)
      )
    else:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1) == labels
    accuracy = 100 * jnp.mean(hits, dtype=losses.dtype)
    return losses.mean(), (dict(model_state), {"accuracy": accuracy})

  def _evaluate(self, params, model_state, batch):
    images = augmentation.normalise(batch["image"], self._mean, self._deviation)
    logits = self._network.apply(
      {"params": params, **model_state}, images, train=False
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch["label"]
    )
    is_row = batch["is_row"]
    return {
      "loss": jnp.sum(jnp.where(is_row, losses, 0)),
      "hits": jnp.sum((jnp.argmax(logits, -1) == batch["label"]) & is_row),
    }


def means(progress: Progress) -> dict[str, Optional[float]]:
  """The means of this epoch so far, None where every step was skipped."""
  sums = host_metrics(progress.sums)
  return {
    name: sums[name] / sums["rows"] if sums["rows"] else None for name in MEANS
  }


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """One word for each array: of its bits, each by a weight of its place.

  A sum of integers does not depend on how an array is split over devices.

  Args:
    tree: of arrays and typed keys.

  Returns:
    Shape ``[number of arrays]``, uint32.
  """
  return jnp.stack([_checksum(x) for x in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  size = x.dtype.itemsize
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[size]
  words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
  places = jnp.arange(math.prod(words.shape), dtype=jnp.uint32)
  weights = 2 * places.reshape(words.shape) + 1
  return jnp.sum(words * weights, dtype=jnp.uint32)

"""The programs of a run: its first state, and its step on the devices."""

import functools
from typing import Any, NamedTuple, Optional, cast

from flax import struct
import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.train import gate
from fsam_optax.experiments.train import loss
from fsam_optax.experiments.train import means
from fsam_optax.experiments.train import optimizer
from fsam_optax.experiments.train.config import Config


class Progress(struct.PyTreeNode):
  """All that a run is, and so all the arrays that a checkpoint has to hold.

  Attributes:
    state: the train state; a skipped step leaves it as it was.
    batches: number of batches that were taken, shape ``[]``, int32.
    skipped: steps of this epoch that were skipped, shape ``[]``, int32.
    skipped_in_a_row: steps up to now, shape ``[]``, int32.
  """

  state: fsam_optax.TrainState
  batches: jax.Array
  skipped: jax.Array
  skipped_in_a_row: jax.Array


class Shapes(NamedTuple):
  """What the programs are compiled for.

  Attributes:
    image: height, width and channels.
    dtype: of the images, before they are normalized.
    classes: number of classes.
    steps_an_epoch: number of batches.
    last_size: rows of the last batch of an epoch, 0 where it is a whole one.
  """

  image: tuple[int, ...]
  dtype: Any
  classes: int
  steps_an_epoch: int
  last_size: int


def _network_of(config: Config, classes: int) -> Any:
  network = config.network
  assert network.model is not None
  return networks.REGISTRY[network.model].create(
    classes,
    depth=network.depth,
    width=network.width,
    dropout=network.dropout,
    dtype=jnp.dtype(network.dtype),
  )


class Program:
  """The functions of a run on the devices of a mesh.

  Attributes:
    config: the configuration.
    shapes: of the data.
    mesh: the devices.
    steps: number of batches of the whole run.
    network: the Flax module.
    mean: of each channel, shape ``[C]``.
    standard_deviation: of each channel, shape ``[C]``.
  """

  def __init__(
    self,
    config: Config,
    shapes: Shapes,
    mesh: Mesh,
    *,
    mean: Any,
    standard_deviation: Any,
  ) -> None:
    """Builds the functions; nothing is compiled yet.

    Args:
      config: the configuration.
      shapes: of the data.
      mesh: the devices, with an axis ``batch``.
      mean: of each channel, shape ``[C]``, or ``[1]`` for all.
      standard_deviation: of each channel, shape ``[C]``, or ``[1]`` for all.
    """
    self.config, self.shapes, self.mesh = config, shapes, mesh
    self.steps = config.descent.epochs * shapes.steps_an_epoch
    is_double = config.network.dtype == "float64"
    self._dtype = jnp.float64 if is_double else jnp.float32
    constant = lambda x: np.broadcast_to(
      np.asarray(x, self._dtype), shapes.image[-1:]
    )
    self.mean = constant(mean)
    self.standard_deviation = constant(standard_deviation)
    self.network = _network_of(config, shapes.classes)
    # Once: a state of another one would not fit the compiled step.
    self._tx = optimizer.descent(config, self.steps)
    self._perturbation = optimizer.perturbation(config)
    self._gate = gate.Gate(
      config.ascent.every,
      config.ascent.start,
      config.ascent.stop,
      shapes.steps_an_epoch,
    )
    self._augmentation = augmentation.Augmentation(
      config.images.flip,
      config.images.crop_padding,
      config.images.cutout,
      config.images.cutout_probability,
    )

  def ascends(self, number: int) -> bool:
    """Whether a batch, counted from 0, goes through both passes.

    It counts the batches, as the augmentation does, and not the steps of the
    state, which stand still at a step that is skipped: so the host knows which
    program comes next without waiting for the last one. The two counts are the
    same as long as nothing is skipped.
    """
    return self._perturbation is not None and self._gate(number)

  def create(self, seed: int) -> Progress:
    """The progress of a run before its first step, not on the mesh yet."""
    init, dropout = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *self.shapes.image), self._dtype)
    # One program, not one for every layer.
    variables = dict(
      jax.jit(functools.partial(self.network.init, train=False))(init, images)
    )
    variables = jax.tree.map(lambda x: x.astype(self._dtype), variables)
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=variables.pop("params"),
      tx=self._tx,
      perturbation=self._perturbation,
      model_state=variables,
      rng=dropout,
    )
    zero = lambda: jnp.zeros([], jnp.int32)
    return Progress(state, zero(), zero(), zero())

  def sums(self, numbers: Optional[dict[str, Any]] = None) -> means.Sums:
    """The sums of the metrics on the devices: new ones, or of a checkpoint."""
    return fsam_optax.sharding.place_state(
      means.from_json(numbers or {}, self._dtype), self.mesh
    )

  def place(self, progress: Progress) -> Progress:
    """The progress on the devices, the same in every process."""
    return fsam_optax.sharding.place_state(progress, self.mesh, self._rule)

  def abstract(self) -> Progress:
    """Shapes, dtypes and shardings of the progress; nothing is computed."""

    def place(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      spec = self._rule(name, x) if self._rule else PartitionSpec()
      return jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)
      )

    return jax.tree_util.tree_map_with_path(
      place, jax.eval_shape(lambda: self.create(0))
    )

  def lower_step(self, rows: int, *, ascends: bool = True) -> Any:
    """The step for a batch of so many rows, to be compiled.

    Args:
      rows: of all devices together.
      ascends: whether it takes both passes.

    Returns:
      A function of the progress, the sums of :mod:`.means` and a batch, of
      which it takes the first two over, that returns them and the metrics.
    """
    progress = self.abstract()
    replicated = NamedSharding(self.mesh, PartitionSpec())
    sums = {
      name: jax.ShapeDtypeStruct((2,), self._dtype, sharding=replicated)
      for name in means.NAMES
    }
    # Every array comes out as it went in: the compiler, left to choose, may
    # move one, and the next call would be refused.
    shardings = jax.tree.map(lambda x: x.sharding, (progress, sums))
    step = jax.jit(
      functools.partial(self.step, ascends=ascends),
      donate_argnums=(0, 1),
      out_shardings=(*shardings, None),
    )
    return step.lower(progress, sums, self._abstract_batch(rows))

  def step(
    self,
    progress: Progress,
    sums: means.Sums,
    batch: dict[str, jax.Array],
    *,
    ascends: bool = True,
  ) -> tuple[Progress, means.Sums, dict[str, jax.Array]]:
    """Augments a batch, takes the step and counts; a pure function."""
    state = progress.state
    assert state.rng is not None
    # By the batches, not by the step that the state counts: that stands still
    # when one is skipped, and the next batch would get the same draws.
    key = jax.random.fold_in(
      jax.random.fold_in(state.rng, 2**32 - 1), progress.batches
    )
    draws = augmentation.draw(self._augmentation, key, batch["image"].shape)
    images = augmentation.augment(
      self._augmentation,
      draws,
      batch["image"],
      self.mean,
      self.standard_deviation,
    )
    state, metrics = self._train_step(ascends)(
      state, {"image": images, "label": batch["label"]}
    )
    is_first = progress.batches % self.shapes.steps_an_epoch == 0
    skipped = metrics["skipped"]
    progress = Progress(
      state=state,
      batches=progress.batches + 1,
      skipped=jnp.where(is_first, 0, progress.skipped) + skipped,
      skipped_in_a_row=jnp.where(
        skipped == 0, 0, progress.skipped_in_a_row + skipped
      ),
    )
    sums = means.add(sums, metrics, len(batch["label"]), is_first)
    return progress, sums, metrics

  @property
  def _rule(self) -> Optional[Any]:
    """Which arrays are split over the devices; None for none."""
    if self.config.descent.sharding != "fsdp":
      return None
    return fsam_optax.sharding.fsdp_rule(self.mesh, self.mesh.axis_names)

  def _abstract_batch(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names))
    leaf = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return {
      "image": leaf((rows, *self.shapes.image), self.shapes.dtype),
      "label": leaf((rows,), jnp.int32),
    }

  def _train_step(self, ascends: bool) -> Any:
    """The step over both passes, or over the first, which feeds the average."""
    ascent = self.config.ascent
    has_axis = self.config.descent.sharding == "shard_map"
    axes = self.mesh.axis_names
    step = fsam_optax.make_train_step(
      loss.loss_of(
        self.network,
        self.shapes.classes,
        self.config.descent.label_smoothing,
      ),
      axis_name=axes if has_axis else None,
      sync_perturbation=ascent.sync_perturbation,
      ema_gradient=ascent.ema_gradient,
      num_microbatches=self.config.descent.num_microbatches,
      ascent_fraction=ascent.ascent_fraction,
      stop=None if ascends else 0,
      skip_nonfinite=self.config.descent.skip_nonfinite,
      metrics=("gradient_norm",),
      jit=False,
    )
    if not has_axis:
      return step
    # A replica can ascend along a gradient of its own only where the devices
    # have a name. The images are augmented before, by draws for all of them.
    return jax.shard_map(
      cast(Any, step),
      mesh=self.mesh,
      in_specs=(PartitionSpec(), PartitionSpec(axes)),
      out_specs=PartitionSpec(),
    )

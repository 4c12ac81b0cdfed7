"""The programs of a run: its first state, its step and its evaluation."""

import functools
from typing import Any, Callable, Optional, cast

import jax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax

import fsam_optax
from fsam_optax.experiments import data
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import optimizers
from fsam_optax.experiments.common.flags import FlagError
from fsam_optax.experiments.data import augmentation
from fsam_optax.experiments.train import batches
from fsam_optax.experiments.train.flag_checks import naming_flags
from fsam_optax.experiments.train.flags_and_recipes import MASKS
from fsam_optax.experiments.train.flags_and_recipes import Settings
from fsam_optax.experiments.train.flags_and_recipes import steps_of
from fsam_optax.experiments.train.run_state import RunState

AUGMENTATION_STREAM = 2**32 - 1


class Program:
  """The functions of a run on the devices of a mesh.

  Attributes:
    config: the configuration.
    mesh: the devices.
    image: height, width and channels.
    steps_an_epoch: number of batches.
    steps: number of batches of the whole run.
    learning_rate: at each step, a cosine from the first to 0 after all.
  """

  def __init__(
    self, config: Settings, images: data.Images, mesh: Optional[Mesh] = None
  ) -> None:
    """Builds the functions for images of these shapes; compiles nothing yet.

    The mesh has one axis, ``batch``; None is a mesh of all devices.

    Raises:
      FlagError: if the flags do not fit the devices, or no step ascends.
    """
    self.config = config
    self.mesh = mesh or jax.make_mesh(
      (jax.device_count(),),
      ("batch",),
      axis_types=(jax.sharding.AxisType.Auto,),
    )
    is_split = config.descent.sharding == "fsdp"
    self._rule = fsam_optax.sharding.fsdp_rule(self.mesh) if is_split else None
    self.image = images.x_train.shape[1:]
    self._image_dtype = images.x_train.dtype
    rows = len(images.y_train) - config.images.validation
    self.steps_an_epoch = rows // config.descent.batch_size
    self.steps = config.descent.epochs * self.steps_an_epoch
    dtype = jnp.dtype(config.network.dtype)
    self._dtype = jnp.promote_types(dtype, jnp.float32)
    constant = lambda x: np.broadcast_to(
      np.asarray(x, self._dtype), self.image[-1:]
    )
    chosen = config.images
    self._moments = constant(chosen.mean), constant(chosen.standard_deviation)
    self._network = networks.REGISTRY[config.network.model].create(
      images.classes,
      depth=config.network.depth,
      width=config.network.width,
      dtype=dtype,
    )
    self._augmentation = augmentation.Augmentation(
      chosen.flip,
      chosen.crop_padding or 0,
      chosen.cutout or 0,
      chosen.cutout_probability,
    )
    self.learning_rate = optax.cosine_decay_schedule(
      config.descent.learning_rate, self.steps
    )
    # Once: a state of another one would not fit the compiled step.
    self._tx = optax.chain(
      # Before the momentum, which so averages the decay too: PyTorch's SGD.
      optax.add_decayed_weights(config.descent.weight_decay),
      optax.sgd(self.learning_rate, momentum=config.descent.momentum),
    )
    with naming_flags():
      self._perturbation = perturbation(config)
      self._train_step = self._make_train_step()
    self._check_devices()

  def create(self, seed: int) -> RunState:
    """The state of a run before its first step, on one device."""
    init, dropout = jax.random.split(jax.random.key(seed))
    images = jnp.zeros((1, *self.image), self._dtype)
    # One program, not one for every layer.
    variables = dict(jax.jit(self._network.init)(init, images))
    variables = jax.tree.map(lambda x: x.astype(self._dtype), variables)
    state = fsam_optax.TrainState.create(
      apply_fn=None,
      params=variables.pop("params"),
      tx=self._tx,
      perturbation=self._perturbation,
      model_state=variables,
      rng=dropout,
    )
    return RunState.begin(state, self._dtype)

  def place(self, run_state: RunState) -> RunState:
    """The state of a run on the devices, the same in every process."""
    return fsam_optax.sharding.place_state(run_state, self.mesh, self._rule)

  def abstract(self) -> RunState:
    """Shapes, dtypes and shardings of that state; nothing is computed."""
    with naming_flags():
      shapes = jax.eval_shape(lambda: self.create(0))
    return abstract(shapes, self.mesh, self._rule)

  def lower_step(self) -> Any:
    """The step, to be compiled: from state and batch to state and metrics.

    The state that it is called with is donated.

    Raises:
      FlagError: if a batch does not split as the flags ask for.
    """
    run_state = self.abstract()
    rows = self.config.descent.batch_size
    split = NamedSharding(self.mesh, PartitionSpec("batch"))
    leaf = functools.partial(jax.ShapeDtypeStruct, sharding=split)
    batch = {
      "image": leaf((rows, *self.image), self._image_dtype),
      "label": leaf((rows,), jnp.int32),
    }
    # Else the compiler may move an array, and the next call would be refused.
    shardings = jax.tree.map(lambda x: x.sharding, run_state)
    step = jax.jit(self.step, donate_argnums=0, out_shardings=(shardings, None))
    with naming_flags():
      return step.lower(run_state, batch)

  def step(
    self, run_state: RunState, batch: dict[str, jax.Array]
  ) -> tuple[RunState, dict[str, jax.Array]]:
    """Augments a batch, takes the step and counts; a pure function."""
    # By the batches: the step of the state stands still where one is skipped.
    key = jax.random.fold_in(
      jax.random.fold_in(cast(Any, run_state.state.rng), AUGMENTATION_STREAM),
      run_state.batches,
    )
    images = augmentation.augment(
      self._augmentation,
      augmentation.draw(self._augmentation, key, batch["image"].shape),
      batch["image"],
      *self._moments,
    )
    state, metrics = self._train_step(
      run_state.state, {"image": images, "label": batch["label"]}
    )
    rows = len(batch["label"])
    after = run_state.after(state, metrics, rows, self.steps_an_epoch)
    return after, metrics

  def evaluator(self, rows: int) -> Callable[..., dict[str, float]]:
    """The evaluation, of so many rows at a time on all devices.

    It is a function of a state, all images and all labels, which each process
    has, and returns ``loss`` and ``accuracy`` in percent.
    """
    feed = fsam_optax.sharding.BatchFeeder(self.mesh)
    # On every device, so that each process reads all of it.
    count = jax.jit(
      self._count, out_shardings=NamedSharding(self.mesh, PartitionSpec())
    )

    def evaluate(state, images, labels):
      size = min(rows, len(labels))  # No more than there are.
      size += -size % self.mesh.size
      mine = batches.rows_of_process(size)
      total = {"loss": 0.0, "hits": 0}
      for start in range(0, len(labels), size):
        number = np.arange(start, start + size)[mine]
        # Filled up: another shape would be another program.
        row = number % len(labels)
        batch = {
          "image": images[row],
          "label": labels[row],
          "is_row": number < len(labels),
        }
        sums = count(state.params, state.model_state, feed(batch))
        # Waits: on the CPU, collectives of many steps in flight can deadlock.
        total = {k: v + np.asarray(sums[k]).item() for k, v in total.items()}
      return {
        "loss": total["loss"] / len(labels),
        "accuracy": 100 * total["hits"] / len(labels),
      }

    return evaluate

  def _loss(self, params, model_state, batch, rng):
    """Cross entropy; the accuracy is in percent."""
    logits, model_state = self._network.apply(
      {"params": params, **model_state},
      batch["image"],
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": rng},
    )
    labels = batch["label"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1) == labels
    accuracy = 100 * jnp.mean(hits, dtype=losses.dtype)
    return losses.mean(), (dict(model_state), {"accuracy": accuracy})

  def _count(self, params, model_state, batch):
    images = augmentation.normalize(batch["image"], *self._moments)
    logits: Any = self._network.apply(
      {"params": params, **model_state}, images, train=False
    )
    labels, is_row = batch["label"], batch["is_row"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
      "loss": jnp.sum(jnp.where(is_row, losses, 0)),
      "hits": jnp.sum((jnp.argmax(logits, -1) == labels) & is_row),
    }

  def _check_devices(self) -> None:
    descent, devices = self.config.descent, self.mesh.size
    if descent.batch_size % devices:
      raise FlagError(
        "--batch-size",
        f"must split evenly over {devices} devices, got {descent.batch_size}",
      )
    has_parts = devices > 1 or descent.num_microbatches > 1
    if not self.config.ascent.sync_perturbation and not has_parts:
      raise FlagError(
        "--no-sync-perturbation",
        "must have several devices or --num-microbatches, got one of each",
      )

  def _make_train_step(self) -> Any:
    ascent, descent = self.config.ascent, self.config.descent
    start = steps_of(ascent.start, self.steps_an_epoch)
    stop = None
    if ascent.stop is not None:
      stop = steps_of(ascent.stop, self.steps_an_epoch)
    if start >= (self.steps if stop is None else min(stop, self.steps)):
      raise FlagError(
        "--start" if stop is None or start >= self.steps else "--stop",
        f"must leave some of the {self.steps} steps that ascend. --optimizer "
        "sgd trains without an ascent",
      )
    is_local = not ascent.sync_perturbation and self.mesh.size > 1
    step = fsam_optax.make_train_step(
      self._loss,
      axis_name="batch" if is_local else None,
      sync_perturbation=ascent.sync_perturbation,
      ema_gradient=ascent.ema_gradient,
      num_microbatches=descent.num_microbatches,
      ascent_fraction=ascent.ascent_fraction,
      every=ascent.every,
      start=start,
      stop=stop,
      skip_nonfinite=descent.skip_nonfinite,
      metrics=("gradient_norm",),
      jit=False,
    )
    # A device has a gradient of its own only where the devices have a name.
    if is_local:
      step = fsam_optax.sharding.shard_map_step(step, self.mesh)
    return step


def abstract(tree: Any, mesh: Mesh, rule: Optional[Any] = None) -> Any:
  """A tree as :func:`fsam_optax.sharding.place_state` places it, as shapes."""

  def place(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    spec = PartitionSpec() if rule is None else rule(name, x)
    return jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
    )

  return jax.tree_util.tree_map_with_path(place, tree)


def perturbation(config: Settings) -> Optional[optax.GradientTransformation]:
  """The ascent of the optimizer, None for SGD."""
  ascent = config.ascent
  make = optimizers.REGISTRY[ascent.optimizer].perturbation
  names = ("rho", "sigma", "lmbda", "adaptive", "average")
  return make and make(
    mask=MASKS[ascent.mask], **{name: getattr(ascent, name) for name in names}
  )

"""How the authors train CIFAR, and what a run of ``train`` is made of."""

from typing import Any, NamedTuple, Optional

from fsam_optax._two_passes import EmaGradient

MODELS = ("resnet", "vgg", "wide_resnet")
OPTIMIZERS = ("sgd", "sam", "fsam")


class Config(NamedTuple):
  """Everything that the numbers of a run depend on, but its data and seed.

  The defaults are the authors' script for ResNet-18 on CIFAR-100
  (`<https://github.com/nblt/F-SAM>`_, ``run.sh`` and ``train.py``).

  Attributes:
    model: one of :data:`MODELS`.
    depth: number of layers, as the model's name has it.
    width: channels of the first stage; of ``wide_resnet`` the widening factor.
    dropout: before the linear layers, of ``vgg`` alone.
    dtype: of the computation; parameters are float32, or float64 with it.
    optimizer: one of :data:`OPTIMIZERS`.
    rho: radius of the perturbation.
    sigma: share of the moving average that F-SAM subtracts.
    lmbda: decay of the moving average.
    adaptive: whether the radius is in ASAM's metric.
    ascent_fraction: share of the rows that the ascent takes.
    ema_gradient: which gradient feeds the average.
    microbatches: number of parts of a batch that go through one at a time.
    learning_rate: at the first step; a cosine takes it to 0, a step at a time.
    momentum: of SGD.
    nesterov: whether it is Nesterov's.
    weight_decay: coupled, of all parameters.
    label_smoothing: in ``[0, 1)``.
    epochs: passes over the training rows.
    batch_size: rows a step, of all devices together.
    drop_last: whether rows that fill no whole batch wait for another epoch.
    flip: see :class:`~fsam_optax.experiments.augmentation.Augmentation`.
    crop_padding: as there.
    cutout: as there.
    cutout_probability: as there.
    mean: of each channel, of images scaled to [0, 1]; None for that of the
      training images.
    deviation: as the mean.
    label_noise: share of the training labels that are replaced.
    label_noise_kind: ``"symmetric"`` or ``"asymmetric"``.
    validation: training rows to evaluate on in the place of the test rows.
    image_size: side to which the files of a folder are scaled, in pixels.
  """

  model: str = "resnet"
  depth: int = 18
  width: int = 64
  dropout: float = 0.5
  dtype: str = "float32"
  optimizer: str = "fsam"
  rho: float = 0.2
  sigma: float = 1.0
  lmbda: float = 0.95
  adaptive: bool = False
  ascent_fraction: float = 1.0
  ema_gradient: EmaGradient = "ascent"
  microbatches: int = 1
  learning_rate: float = 0.05
  momentum: float = 0.9
  nesterov: bool = False
  weight_decay: float = 1e-3
  label_smoothing: float = 0.0
  epochs: int = 200
  batch_size: int = 128
  drop_last: bool = False
  flip: bool = True
  crop_padding: int = 4
  cutout: int = 16
  cutout_probability: float = 0.5
  mean: Optional[tuple[float, ...]] = (0.4914, 0.4822, 0.4465)
  deviation: Optional[tuple[float, ...]] = (0.2023, 0.1994, 0.2010)
  label_noise: float = 0.0
  label_noise_kind: str = "symmetric"
  validation: int = 0
  image_size: Optional[int] = None


class Recipe(NamedTuple):
  """A data set, and what differs from the defaults of :class:`Config`."""

  dataset: str
  config: Config


_recipe = lambda dataset, **changes: Recipe(
  dataset, Config()._replace(**changes)
)
_WIDE: dict[str, Any] = {"model": "wide_resnet", "depth": 28, "width": 10}

# The authors publish a script for the first alone, in which they name the other
# two networks; the numbers of all four are those of that script.
RECIPES = {
  "cifar100-resnet18": _recipe("cifar100"),
  "cifar10-resnet18": _recipe("cifar10"),
  "cifar100-vgg16bn": _recipe("cifar100", model="vgg", depth=16),
  "cifar100-wrn28x10": _recipe("cifar100", **_WIDE),
}

"""The study of the momentum: the optimizer's average in place of F-SAM's.

SAM, F-SAM and F-SAM with ``average="optimizer"`` in several settings, each with
its own learning rate, radius and weight decay: 27 points in steps of a square
root of two, which go on where the best is at an end, on validation rows of the
same seeds. The tables show all that the rows hold.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
from jax import numpy as jnp
import optax

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import settings
from fsam_optax.experiments.lab import trainer
from fsam_optax.experiments.lab import tuned_values
from fsam_optax.experiments.lab.laboratory import Lab
from fsam_optax.experiments.lab.store import Row
from fsam_optax.experiments.lab.study import Study
from fsam_optax.experiments.studies import cifar

_CLIP = 0.5
_CLIPPED = f"SGD behind a clip at {_CLIP}"


def _momentum(rho: Any) -> optax.GradientTransformation:
  return fsam_optax.friendly_perturbation(
    rho, lmbda=trainer.MOMENTUM, average="optimizer"
  )


def _adamw(
  learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  return optax.adamw(schedule, b1=trainer.MOMENTUM, weight_decay=weight_decay)


def _clipped(
  learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
  return optax.chain(
    optax.clip_by_global_norm(_CLIP),
    trainer.descent(learning_rate, weight_decay, steps),
  )


class Transformer(nn.Module):
  """Two blocks of attention over patches of 2 x 2 pixels, 32 channels wide."""

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps images `[B, H, W, C]` to logits `[B, classes]`."""
    del train
    x = nn.Conv(32, (2, 2), 2)(x).reshape(len(x), -1, 32)
    x += self.param("position", nn.initializers.normal(0.02), x.shape[1:])
    for _ in range(2):
      y = nn.LayerNorm()(x)
      x += nn.MultiHeadDotProductAttention(4)(y, y)
      x += nn.Dense(32)(nn.gelu(nn.Dense(64)(nn.LayerNorm()(x))))
    return nn.Dense(self.classes)(jnp.mean(nn.LayerNorm()(x), axis=1))


class Setting(NamedTuple):
  """What is trained on what, by which optimizer, and where searches begin.

  Attributes:
    dataset: its name.
    model: name of the network.
    label_noise: fraction of wrong training labels.
    optimizer: its name.
    make_tx: from the learning rate, the weight decay and the number of steps.
    rates: learning rates.
    radii: of the ascent.
    decays: weight decays.
  """

  dataset: str
  model: str
  label_noise: float
  optimizer: str
  make_tx: Callable[..., optax.GradientTransformation]
  rates: tuple[float, ...]
  radii: tuple[float, ...]
  decays: tuple[float, ...]

  @property
  def title(self) -> str:
    """As the tables have it."""
    what = f"{self.dataset}, {self.model}, {self.label_noise:.0%} wrong"
    return f"{what}, {self.optimizer}".replace("%", " %")


_FORMS = {
  "SAM": arms.SAM,
  "F-SAM, momentum": arms.Arm(_momentum),
  "F-SAM": arms.FSAM,
}
_CONVOLUTIONS = "three convolutions"
_SGD = functools.partial(
  Setting,
  optimizer="SGD",
  make_tx=trainer.descent,
  rates=(0.028, 0.04, 0.056),
  radii=(0.2, 0.28, 0.4),
  decays=(0.01, 0.014, 0.02),
)
_ADAMW = functools.partial(
  Setting,
  optimizer="AdamW",
  make_tx=_adamw,
  rates=(0.001, 0.0014, 0.002),
  radii=(0.28, 0.4, 0.56),
  decays=(0.5, 0.7, 1.0),
)
SETTINGS = (
  _SGD("mnist", "mlp", 0.4),
  _ADAMW("mnist", "mlp", 0.4),
  _SGD(
    *("mnist", "mlp", 0.0),
    rates=(0.11, 0.16, 0.22),
    radii=(0.098, 0.14, 0.2),
    decays=(0.0071, 0.01, 0.014),
  ),
  _SGD("digits", "mlp", 0.4),
  _SGD("digits", "mlp", 0.4, optimizer=_CLIPPED, make_tx=_clipped),
  _SGD("digits", "cnn", 0.4),
  _ADAMW("digits", "transformer", 0.4),
  _SGD("cifar10", _CONVOLUTIONS, 0.4, radii=(0.1, 0.14, 0.2)),
  _SGD("cifar10", _CONVOLUTIONS, 0.0, radii=(0.1, 0.14, 0.2)),
)


def _run(lab: Lab) -> dict[str, Any]:
  for setting in SETTINGS[: 1 if lab.is_quick else None]:
    if setting.dataset != "cifar10" or lab.sources.get("cifar10"):
      train(lab, setting)
  return report(lab.store.rows)


def report(rows: Sequence[Row]) -> dict[str, Any]:
  """What the JSON holds of rows: the settings of which all forms are there."""
  results = {}
  for setting in SETTINGS:
    of = {row["arm"]: row for row in rows if is_of(setting, row)}
    if of.keys() >= _FORMS.keys():
      results[setting.title] = {name: of[name] for name in _FORMS}
  found = paired_report.by_setting("setting", results)
  config = {
    "dataset": "several data sets",
    "model": "several networks",
    "label_noise": sorted({setting.label_noise for setting in SETTINGS}),
    "weight_decay": "searched",
  }
  return {**found, "config": config}


def is_of(setting: Setting, row: Row) -> bool:
  """Whether a row is one of the tests of a setting."""
  fields = ("dataset", "model", "label_noise", "optimizer")
  return row["phase"] == "test" and all(
    row[name] == getattr(setting, name) for name in fields
  )


def train(lab: Lab, setting: Setting) -> None:
  """Searches and tests the three forms in a setting."""
  if setting.dataset == "cifar10":
    pool = cifar.load("cifar10", str(lab.sources["cifar10"]))
    lab = cifar.at(lab, pool, setting.label_noise)
    lab = lab.at(seeds=lab.seeds[:16])
  else:
    name = setting.model if setting.model in networks.REGISTRY else "cnn"
    recipe = tuned_values.recipe(setting.dataset, name, None)
    create = networks.REGISTRY[name].create
    lab = lab.at(
      pool=settings.load(settings.Data(setting.dataset, model=name)),
      model=setting.model,
      network=Transformer if setting.model == "transformer" else create,
      label_noise=setting.label_noise,
      epochs=lab.epochs if lab.is_quick else recipe.epochs,
    )
  lab = lab.at(
    arms={
      name: x._replace(
        rates=setting.rates, radii=setting.radii, decays=setting.decays
      )
      for name, x in _FORMS.items()
    },
    described={"optimizer": setting.optimizer},
    trainer_options={**lab.trainer_options, "make_tx": setting.make_tx},
  )
  lab.results(with_candidates=not lab.more_seeds)


STUDY = Study(
  "momentum",
  "does the optimizer's momentum serve as the average?",
  _run,
  _FORMS,
)

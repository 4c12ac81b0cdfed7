"""The study of the momentum: the optimizer's average in place of F-SAM's.

SAM, F-SAM and F-SAM with ``average="optimizer"``, by SGD and by AdamW. The
study ``cifar`` has the same on CIFAR.
"""

import functools
from typing import Any

import optax

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab import trainer
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.studies import label_noise

_CLIP = 0.5


def _adamw(
  learning_rate: Any, weight_decay: Any, steps: int
) -> optax.GradientTransformation:
  schedule = optax.cosine_decay_schedule(learning_rate, steps)
  return optax.adamw(schedule, b1=arms.MOMENTUM, weight_decay=weight_decay)


def _clipped(*rates_and_steps: Any) -> optax.GradientTransformation:
  clip = optax.clip_by_global_norm(_CLIP)
  return optax.chain(clip, trainer.descent(*rates_and_steps))


def _setting(
  title: str,
  optimizer: str = "SGD",
  make_tx: Any = trainer.descent,
  **fields: Any,
) -> study.Setting:
  changes = {
    "described": {"optimizer": optimizer},
    "trainer_options": {"make_tx": make_tx},
  }
  return study.Setting(title, changes=changes, **fields)


_AT_ADAMW = dict.fromkeys(("sam", "fsam"), Point(0.003, 0.4, 2.0))
SETTINGS = [
  _setting("mnist, SGD"),
  _setting("mnist, AdamW", "AdamW", _adamw, best=_AT_ADAMW),
  _setting(
    "mnist, no wrong label, SGD", best=label_noise.RIGHT_LABELS, label_noise=0.0
  ),
  _setting("digits, SGD", dataset="digits"),
  _setting(
    "digits, SGD behind a clip",
    f"SGD behind a clip at {_CLIP}",
    _clipped,
    dataset="digits",
  ),
  _setting("digits, convolutions, SGD", dataset="digits", model="cnn"),
]
STUDY = study.Study(
  "momentum",
  "does the optimizer's momentum serve as the average?",
  {"SAM": arms.SAM, "F-SAM, momentum": arms.FSAM_MOMENTUM, "F-SAM": arms.FSAM},
  functools.partial(
    paired_report.by_setting,
    pairs=[("F-SAM", "F-SAM, momentum"), ("F-SAM", "SAM")],
  ),
  SETTINGS,
)

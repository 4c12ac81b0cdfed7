"""The study of label noise: accuracy over the fraction of wrong labels."""

import functools

from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import paired_report
from fsam_optax.experiments.lab import study
from fsam_optax.experiments.lab.search import Point

# Where labels are right, the best rates are ten times as high.
RIGHT_LABELS = {
  "sgd": Point(0.23, 0.0, 0.005),
  "sam": Point(0.16, 0.098, 0.01),
  "fsam": Point(0.11, 0.28, 0.01),
}
SETTINGS = [
  study.Setting(f"{x:g}", label_noise=x, best={} if x else RIGHT_LABELS)
  for x in (0.0, 0.2, 0.4, 0.6)
]
STUDY = study.Study(
  "label-noise",
  "how does it do with wrong labels?",
  {"SGD": arms.SGD, "SAM": arms.SAM, "F-SAM": arms.FSAM},
  functools.partial(
    paired_report.by_setting,
    pairs=[("F-SAM", "SAM"), ("F-SAM", "SGD")],
    xlabel="label noise",
  ),
  SETTINGS,
)

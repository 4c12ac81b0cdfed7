"""Does a data-parallel step that communicates less cost accuracy?

The recipe of ``python -m fsam_optax compare`` on the MNIST digits with 40 % of
the training labels wrong, by eight emulated replicas of 12 rows each, on 64
seeds. The learning rates and radii are the best of each mode's grid on the
validation rows of seeds 0 to 15, which ``--tune`` prints.

  python benchmarks/replicas.py [--tune] [--quick] [--output replicas.json]
"""

import argparse
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.common import statistics
from fsam_optax.experiments.seeds import splits as splits_lib
from fsam_optax.experiments.seeds import trainer as trainer_lib
from fsam_optax.experiments.studies import arms

REPLICAS, BATCH_SIZE, EPOCHS, LABEL_NOISE = 8, 96, 60, 0.4
TUNING_SEEDS, SEEDS = range(16), range(200, 264)
LOCAL = {"sync_perturbation": False}
DESCENT = {"ema_gradient": "descent"}


class Mode(NamedTuple):
  """A way to train, its learning rate and radius and the grids of `--tune`."""

  optimizer: str
  options: dict[str, Any]
  words: int  # All-reduced a parameter and step; tests/test_sharding.py.
  learning_rate: float
  rho: float
  learning_rates: tuple[float, ...]
  radii: tuple[float, ...]


RATES = (0.01, 0.015, 0.02, 0.03)
# A replica's 12 rows are easily harmed: their radii are smaller.
LOCAL_RATES = (0.01, 0.015, 0.02, 0.03, 0.04)
LOCAL_RADII = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
MODES = {
  "SGD": Mode("sgd", {}, 1, 0.004, 0.0, (0.002, 0.003, 0.004, 0.006), (0.0,)),
  "SAM": Mode("sam", {}, 2, 0.02, 0.35, RATES, (0.25, 0.3, 0.35, 0.4, 0.5)),
  "SAM, local": Mode("sam", LOCAL, 1, 0.015, 0.15, LOCAL_RATES, LOCAL_RADII),
  "F-SAM, default": Mode(
    "fsam", {}, 2, 0.02, 0.5, RATES, (0.35, 0.4, 0.5, 0.6, 0.7)
  ),
  "F-SAM, average of the second gradient": Mode(
    "fsam", DESCENT, 2, 0.015, 0.5, RATES, (0.35, 0.4, 0.5, 0.6, 0.7)
  ),
  "F-SAM, local": Mode("fsam", LOCAL, 2, 0.02, 0.2, LOCAL_RATES, LOCAL_RADII),
  "F-SAM, lean": Mode(
    "fsam",
    {**LOCAL, **DESCENT},
    1,
    0.02,
    0.2,
    LOCAL_RATES,
    LOCAL_RADII,
  ),
}


def trainer_of(
  mode: Mode, pool: splits_lib.Pool, epochs: int
) -> trainer_lib.Trainer:
  """The trainer of one mode."""
  return trainer_lib.Trainer(
    networks.REGISTRY["mlp"].create(pool.classes),
    pool,
    sigma=1.0,
    lmbda=0.9,
    epochs=epochs,
    batch_size=BATCH_SIZE,
    num_replicas=REPLICAS,
    **mode.options,
  )


def tune(
  pool: splits_lib.Pool, epochs: int, seeds: range, names: list[str]
) -> dict[str, Any]:
  """Mean validation accuracy at every point of the grids of some modes."""
  splits = splits_lib.split(pool, seeds, LABEL_NOISE)
  result = {}
  for name in names:
    mode = MODES[name]
    trainer = trainer_of(mode, pool, epochs)
    number = len(mode.radii)
    repeated = jax.tree.map(
      lambda x, n=number: np.tile(x, (n,) + (1,) * (x.ndim - 1)), splits
    )
    rows = []
    for rate in mode.learning_rates:
      outcome = trainer(
        mode.optimizer,
        repeated,
        np.full(number * len(seeds), rate),
        np.repeat(mode.radii, len(seeds)),
        np.full(number * len(seeds), arms.UNTUNED_DECAY),
        with_curve=False,
      )
      rows.append(outcome.validation_accuracy.reshape(number, -1).mean(axis=1))
    grid = np.array(rows)
    i, j = np.unravel_index(np.argmax(grid), grid.shape)
    result[name] = {
      "learning_rates": mode.learning_rates,
      "radii": mode.radii,
      "validation_accuracy": grid.tolist(),
      "best": [mode.learning_rates[i], mode.radii[j]],
    }
    print(name, result[name]["best"], flush=True)
    print(np.array2string(grid, precision=2), flush=True)
  return result


def accuracies(
  pool: splits_lib.Pool, epochs: int, seeds: range
) -> dict[str, np.ndarray]:
  """Test accuracy of every mode and seed, at the values chosen."""
  splits = splits_lib.split(pool, seeds, LABEL_NOISE)
  result = {}
  for name, mode in MODES.items():
    outcome = trainer_of(mode, pool, epochs)(
      mode.optimizer,
      splits,
      np.full(len(seeds), mode.learning_rate),
      np.full(len(seeds), mode.rho),
      np.full(len(seeds), arms.UNTUNED_DECAY),
      with_curve=False,
    )
    result[name] = outcome.test_accuracy
    print(f"{name}: {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
  return result


def main():
  """Tunes or reports."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--tune", action="store_true", help="print the grids on validation rows"
  )
  parser.add_argument(
    "--quick", action="store_true", help="2 seeds and 2 epochs, to see it run"
  )
  parser.add_argument(
    "--modes",
    nargs="+",
    choices=MODES,
    default=list(MODES),
    metavar="MODE",
    help=f"that --tune is for, out of {', '.join(map(repr, MODES))}",
  )
  parser.add_argument("--output", help="also write the numbers to this file")
  args = parser.parse_args()
  pool = splits_lib.load("mnist", 14)
  epochs = 2 if args.quick else EPOCHS
  config = {
    "replicas": REPLICAS,
    "batch_size": BATCH_SIZE,
    "epochs": epochs,
    "label_noise": LABEL_NOISE,
    "versions": {"jax": jax.__version__, "fsam_optax": fsam_optax.__version__},
  }
  if args.tune:
    seeds = TUNING_SEEDS[: 2 if args.quick else None]
    result = {"tune": tune(pool, epochs, seeds, args.modes)}
  else:
    seeds = SEEDS[: 2 if args.quick else None]
    accuracy = accuracies(pool, epochs, seeds)
    rows = []
    for name, mode in MODES.items():
      cells = [name, str(mode.words), f"{mode.learning_rate:g}"]
      cells.append(f"{mode.rho:g}" if mode.rho else "")
      cells.append(
        f"{accuracy[name].mean():.2f} ± "
        f"{statistics.standard_error(accuracy[name]):.2f}"
      )
      for other in ("F-SAM, default", "SAM"):
        if name == other:
          cells.append("")
          continue
        pair = statistics.paired(accuracy[name], accuracy[other])
        cells.append(
          f"{pair['mean']:+.2f} ± {pair['standard_error']:.2f}, "
          f"p = {pair['p_value']:.2g}"
        )
      rows.append(cells)
    header = ["mode", "words", "learning rate", "rho", "test accuracy (%)"]
    header += ["over F-SAM, default", "over SAM"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for cells in rows:
      print("| " + " | ".join(cells) + " |")
    result = {
      "accuracy": {name: x.tolist() for name, x in accuracy.items()},
      "chosen": {
        name: [mode.learning_rate, mode.rho] for name, mode in MODES.items()
      },
      "words": {name: mode.words for name, mode in MODES.items()},
    }
  if args.output:
    with open(args.output, "w") as file:
      json.dump({"config": config, "seeds": list(seeds), **result}, file)


if __name__ == "__main__":
  main()

"""The command ``train`` in this process: its plan, and a short run."""

import json

import jax
from jax import numpy as jnp
import numpy as np
from small_program import config_of
from small_program import network_of

from fsam_optax.__main__ import main
from fsam_optax.experiments.train import recipes
from fsam_optax.experiments.train import rows


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
  output = tmp_path / "run"
  main(
    [
      *("train", "--recipe=cifar10-resnet18", "--dry-run", "--devices=1"),
      *(f"--output={output}", "--model=cnn", "--width=4", "--epochs=20"),
    ]
  )
  printed = capsys.readouterr().out
  assert "cifar10, not read: 50,000 to train on, 10,000 to evaluate" in printed
  network = network_of("cnn", 10, width=4)
  variables = jax.eval_shape(
    lambda: network.init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
    )
  )
  count = sum(x.size for x in jax.tree.leaves(variables["params"]))
  assert f"depth 2, width 4: {count:,} parameters, float32" in printed
  assert "391 an epoch, 7,820 in 20 epochs, 128 rows and 2 gradients" in printed
  assert "--rho 0.2 --sigma 1.0 --lmbda 0.95" in printed
  for name in ("memory", "cost"):
    (line,) = (x for x in printed.splitlines() if x.startswith(name))
    number = float(line.split()[1].replace(",", ""))
    assert number > 0
  assert not output.exists()


def test_a_short_run_on_real_digits_learns(capsys, tmp_path):
  """In this process, on 8 devices."""
  flags = [
    *("train", "--data=digits", f"--output={tmp_path}", "--tensorboard"),
    *("--model=cnn", "--batch-size=64", "--drop-last"),
    *("--cutout=0", "--crop-padding=0", "--no-flip"),
    *("--epochs=3", "--log-every=7", "--validation=97", "--rho=0.05"),
  ]
  main(flags)
  printed = capsys.readouterr().out
  assert "on 8 devices" in printed
  assert "validation accuracy" in printed
  assert "waiting for data" in printed
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["evaluated"] == "validation"
  assert summary["standard_error"] is None
  assert summary["mean"] > 60  # Of ten classes.
  assert list((tmp_path / "seed-1" / "tensorboard").iterdir())


def test_label_noise_is_exact_but_for_the_authors_own_data():
  recipe = recipes.RECIPES["cifar10-resnet18"]
  config = config_of(model="mlp", label_noise=0.4, validation=97)
  images, filled = rows.load("digits", recipe, config)
  assert filled.images.label_noise_kind == "symmetric"
  noisy = rows.dataset_of(images, filled, seed=1)
  config = config_of(model="mlp", validation=97)
  clean = rows.dataset_of(images, rows.load("digits", recipe, config)[1], 1)
  assert (noisy.y != clean.y).sum() == round(0.4 * 1200)
  np.testing.assert_array_equal(noisy.y_evaluated, clean.y_evaluated)
  assert {x.label_noise_kind for x in recipes.RECIPES.values()} == {"uniform"}

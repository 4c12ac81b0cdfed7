"""The flags of ``train``: what they leave open, and what is refused."""

import functools
import json
import re

from meshes import make_mesh
import numpy as np
from printed import plain
import pytest
from small_program import images_of
from small_program import settings_of

from fsam_optax.__main__ import main
from fsam_optax._options import PassOptions
from fsam_optax.experiments.common import flags as common_flags
from fsam_optax.experiments.data import images as images_lib
from fsam_optax.experiments.train import flags_and_recipes
from fsam_optax.experiments.train import image_rows
from fsam_optax.experiments.train import main as train_main
from fsam_optax.experiments.train import program
from fsam_optax.experiments.train import run_folder
from fsam_optax.experiments.train.flag_checks import config_of


def test_every_option_of_the_step_is_a_flag(capsys):
  with pytest.raises(SystemExit):
    main(["train", "--help"])
  printed = capsys.readouterr().out
  not_by_flag = {"axis_name", "weight", "checked"}
  for option in PassOptions.__annotations__.keys() - not_by_flag:
    assert f"--{option.replace('_', '-')}" in by_flag()
  assert all(f" {flag}" in printed for flag in by_flag())


def by_flag(*words):
  settings = common_flags.parse(
    flags_and_recipes.Settings, words, program="train", description="Train."
  )
  return config_of(settings, images_of(128, 32)).by_flag()


def test_flags_that_are_not_given_keep_the_value_of_the_recipe():
  network = ("--model", "--depth", "--width")
  found = by_flag()
  assert [found[x] for x in network] == ["resnet", 18, 64]
  descent = flags_and_recipes.by_flag(flags_and_recipes.Descent())
  assert found.items() >= descent.items()
  found = by_flag("--recipe=cifar100-wrn28x10", "--rho=0.1", "--no-flip")
  assert [found[x] for x in network] == ["wide_resnet", 28, 10]
  ascent = flags_and_recipes.by_flag(flags_and_recipes.Ascent(rho=0.1))
  assert found.items() >= ascent.items()
  assert not found["--flip"]
  assert found["--mean"] is not None


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("", "--data: must be given: the path of cifar-100-binary.tar.gz"),
    ("--depth=12", "--depth: must be 8 n + 2, such as 10 or 18, for resnet"),
    ("--data=digits --ascent-fraction=.9999995", "got 0.9999995 of 128 rows"),
    ("--rho=-1", "--rho: must be a number in [0, inf), got '-1'"),
    ("--momentum=1", "--momentum: must be a number in [0, 1), got '1'"),
    ("--start=5%", "--start: must be a number of steps such as 3000, or of"),
    ("--optimizer=sgd --rho=0.1", "--rho: must be left out with --optimizer"),
    ("--optimizer=sam --sigma=0.5", "--optimizer sam, which has no average"),
    ("--data=digits --average=optimizer", "--lmbda: must be the momentum, 0.9"),
    ("--no-sync-perturbation --sharding=fsdp", "must have --sharding replicat"),
    ("--coordinator-address=host", "-address: must be a host and a port such"),
    ("--data=digits --mean 1 2 3", "--mean: must be one number, or one for ea"),
    ("--data=digits --mean=nan", "--mean: must be in (-inf, inf), got (nan,)"),
    ("--data=digits --standard-deviation=1e-50", "must be in (0, inf), got (1"),
    ("--dry-run --image-size=5", "square images that --image-size 5 divides"),
    ("--data=digits --model=vgg", "--model: vgg must have 32 x 32 pixels"),
    ("--data=digits --validation=1297", "--validation: must be at most 1296"),
    ("--data=digits --batch-size=1298", "--batch-size: must be at most 1297"),
    ("--data=digits --crop-padding=8", "--crop-padding: must be at most 7"),
    ("--data=digits --batch-size=20", "--batch-size: must split evenly over 8"),
    ("--data=no.npz", "--data: must be an archive of the arrays"),
  ],
)
def test_a_bad_flag_is_named_with_the_remedy(words, message, capsys, tmp_path):
  output = tmp_path / "run"
  with pytest.raises(SystemExit) as error:
    main(["train", f"--output={output}", *words.split()])
  assert error.value.code == 2
  assert message in plain(capsys.readouterr().err)
  assert not (output / "seed-1").exists()


def test_a_dry_run_prints_the_plan_and_writes_nothing(capsys, tmp_path):
  output = tmp_path / "run"
  words = (
    "--recipe=cifar10-resnet18 --dry-run --model=cnn --width=4 --epochs=20"
  )
  main(["train", f"--output={output}", *words.split()])
  printed = capsys.readouterr().out
  assert "cifar10, not read: 50,000 to train on, 10,000 to evaluate" in printed
  # Of two convolutions, 3 x 3, and of the linear layer behind 8 x 8 pixels.
  count = (9 * 3 + 1) * 4 + (9 * 4 + 1) * 8 + (8 * 8 * 8 + 1) * 10
  assert f"depth 2, width 4: {count:,} parameters, float32" in printed
  assert "390 an epoch, 7,800 in 20 epochs, 128 rows a step" in printed
  assert "--rho 0.2 --sigma 1.0 --lmbda 0.95" in printed
  assert "--mean" not in printed  # Of images that were not read.
  # The flags of the plan can be given again, and are the same plan.
  flags = next(x for x in printed.splitlines() if x.startswith("--"))
  assert "--no-adaptive" in flags
  assert "None" not in flags
  main(["train", "--dry-run", *flags.split()])
  assert capsys.readouterr().out == printed
  for name in ("memory", "cost"):
    (line,) = (x for x in printed.splitlines() if x.startswith(name))
    assert float(line.split()[1].replace(",", "")) > 0
  assert not output.exists()


def test_a_dry_run_sees_the_size_of_the_images_and_the_share_of_a_device(
  capsys,
):
  words = ("--model=mlp", "--width=512", "--image-size=16", "--optimizer=sgd")
  sizes = []
  for sharding in ("replicated", "fsdp"):
    main(["train", "--dry-run", *words, f"--sharding={sharding}"])
    printed = capsys.readouterr().out
    (line,) = re.findall("state of (.*) MiB", printed)
    assert "16 x 16 x 3" in printed
    sizes.append(float(line.replace(",", "")))
  # Weights and momentum, and a device's eighth of those of matrices.
  matrices, others = 512 * (768 + 512 + 100), 512 + 512 + 100
  expected = [matrices + others, matrices / 8 + others]
  np.testing.assert_allclose(sizes, np.multiply(expected, 8 / 2**20), atol=0.06)


def test_a_short_run_on_real_digits_learns(capsys, tmp_path):
  """In this process, on 8 devices."""
  words = (
    "train --data=digits --tensorboard --model=cnn --batch-size=64 --no-flip "
    "--cutout=0 --crop-padding=0 --epochs=3 --log-every=7 --rho=0.05 "
    "--validation=97"
  )
  main([*words.split(), f"--output={tmp_path}"])
  printed = capsys.readouterr().out
  assert "on 8 devices" in printed
  assert "validation accuracy" in printed
  assert "waiting for data" in printed
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["name"] == "digits, cnn"
  assert summary["evaluated"] == "validation"
  assert summary["standard_error"] is None
  assert summary["mean"] > 60  # Of ten classes.
  assert list((tmp_path / "seed-1" / "tensorboard").iterdir())


def test_ascents_of_each_device_go_on_with_as_many_devices(
  tmp_path, monkeypatch
):
  begun = []

  def check_config(path, begun_with, defaults):
    begun.append(begun_with.get("devices", "any"))
    raise run_folder.RunError("no training here")

  monkeypatch.setattr(run_folder, "check_config", check_config)
  for sync in (False, True):
    settings = settings_of(model="mlp", sync_perturbation=sync, data="digits")
    images, config = image_rows.load(settings)
    for devices in (8, 4):
      mesh = make_mesh(batch=devices)
      on_mesh = functools.partial(program.Program, mesh=mesh)
      monkeypatch.setattr(train_main, "Program", on_mesh)
      with pytest.raises(run_folder.RunError):
        train_main._train(config, images, tmp_path)
  assert begun == [8, 4, "any", "any"]


def test_label_noise_is_exact_and_the_crops_are_the_authors():
  options = {"model": "mlp", "validation": 97, "data": "digits"}
  load = lambda **more: image_rows.load(settings_of(**options, **more))
  images, config = load(label_noise=0.4)
  assert (config.images.crop_padding, config.images.cutout) == (1, 4)
  noisy = image_rows.rows_of(images, config, 1)
  clean = image_rows.rows_of(*load(), 1)
  assert (noisy.y_train != clean.y_train).sum() == round(0.4 * 1200)
  np.testing.assert_array_equal(noisy.y_test, clean.y_test)
  for recipe in flags_and_recipes.RECIPES:
    flags = image_rows.load(settings_of(recipe=recipe, dry_run=True))[1].images
    assert flags.label_noise_kind == "symmetric"  # As in every command.
    assert (flags.crop_padding, flags.cutout) == (4, 16)  # The authors'.


# The means and deviations that the images are normalized by.


def load(path, x, image_size=None):
  """A file whose first four rows are those of the test, and its flags."""
  y = np.arange(len(x)) % 2
  np.savez(path, x_train=x[4:], y_train=y[4:], x_test=x[:4], y_test=y[:4])
  changes = {"image_size": image_size, "batch_size": 8, "model": "mlp"}
  images, config = image_rows.load(settings_of(data=str(path), **changes))
  return images, config.images


def test_no_constant_channel_is_divided_by_0(tmp_path):
  x = np.random.default_rng(0).normal(size=(21, 32, 32, 3))
  x[..., 2] = 0.1
  _, flags = load(tmp_path / "a.npz", x)
  assert flags.standard_deviation[2] == 1
  assert flags.mean[2] == np.float32(0.1)


def test_whole_numbers_are_measured_a_part_at_a_time(tmp_path, monkeypatch):
  x = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), np.uint8)
  monkeypatch.setattr(images_lib, "_VALUES_AT_A_TIME", 5 * 3072)
  _, flags = load(tmp_path / "a.npz", x)
  normal = x[4:].astype(np.float64) / 255
  mean, deviation = normal.mean((0, 1, 2)), normal.std((0, 1, 2))
  np.testing.assert_allclose(flags.mean, mean, rtol=1e-12)
  np.testing.assert_allclose(flags.standard_deviation, deviation, rtol=1e-12)


def test_smaller_images_keep_their_unit(tmp_path):
  x = np.random.default_rng(0).integers(0, 256, (21, 64, 64, 3), np.uint8)
  images, flags = load(tmp_path / "a.npz", x, image_size=32)
  blocks = x[4:].reshape(17, 32, 2, 32, 2, 3).mean((2, 4)) / 255
  np.testing.assert_allclose(images.x_train, blocks, atol=1e-7)
  np.testing.assert_allclose(flags.mean, blocks.mean((0, 1, 2)), rtol=1e-6)

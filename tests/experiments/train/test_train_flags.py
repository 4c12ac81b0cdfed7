"""The flags of ``train``: what the recipe fills in, and what is refused."""

import dataclasses

import pytest

from fsam_optax.__main__ import main
from fsam_optax.experiments.common import flags as common_flags
from fsam_optax.experiments.train import config
from fsam_optax.experiments.train import flags


def parse(*words):
  return common_flags.parse(
    flags.Settings, words, program="train", description="Train."
  )


def test_flags_that_are_not_given_keep_the_value_of_the_recipe():
  found = config.config_of(parse())
  assert dataclasses.astuple(found.network)[:3] == ("resnet", 18, 64)
  assert found.descent == flags.Descent()
  found = config.config_of(parse("--recipe=cifar100-wrn28x10", "--rho=0.1"))
  assert dataclasses.astuple(found.network)[:3] == ("wide_resnet", 28, 10)
  assert found.ascent == flags.Ascent(rho=0.1)
  found = config.config_of(parse("--model=vgg", "--width=8", "--no-flip"))
  assert dataclasses.astuple(found.network)[:3] == ("vgg", 16, 8)
  assert found.images == flags.Images(flip=False)


def test_every_option_of_the_step_is_a_flag():
  named = config.Config().by_flag()
  for option in (
    *("sync_perturbation", "ema_gradient", "num_microbatches"),
    *("ascent_fraction", "every", "start", "stop", "skip_nonfinite"),
    *("adaptive", "mask", "order", "accumulator_dtype", "eta"),
  ):
    assert f"--{option.replace('_', '-')}" in named


def test_the_help_fits_a_terminal_and_names_every_flag(capsys):
  with pytest.raises(SystemExit) as ended:
    main(["train", "--help"])
  assert ended.value.code == 0
  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= 80
  for flag in config.Config().by_flag():
    assert f" {flag}" in printed
  assert "--flip, --no-flip" in printed


def error_of(capsys, *words):
  with pytest.raises(SystemExit) as error:
    main(["train", *words])
  assert error.value.code == 2
  printed = capsys.readouterr().err
  assert printed.count("\n") == 1, printed
  return printed


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("", "--data: must be given: the path of cifar-100-binary.tar.gz"),
    ("--depth=12", "--depth: must be 8 n + 2, such as 10 or 18, for resnet"),
    ("--model=vgg --depth=12", "--depth: must be one of 11, 13, 16, 19"),
    ("--model=wide_resnet --depth=11", "--depth: must be 6 n + 4"),
    ("--learning-rate=0", "--learning-rate: must be a finite number above 0"),
    ("--learning-rate=1e39", "--learning-rate: must be finite in float32"),
    ("--ascent-fraction=0", "--ascent-fraction: must be a number in (0, 1]"),
    ("--rho=-1", "--rho: must be a finite number, 0 or more, got '-1'"),
    ("--momentum=1", "--momentum: must be a number in [0, 1), got '1'"),
    ("--mean=a,b", "--mean: must be finite numbers with commas between"),
    ("--standard-deviation=0", "--standard-deviation: must be numbers above 0"),
    ("--optimizer=adam", "--optimizer: must be one of sgd, sam, fsam, got"),
    ("--mask=heads", "--mask: must be one of none, exclude_biases_and_norms"),
    ("--start=5%", "--start: must be a number of steps such as 3000, or of"),
    ("--nesterov --momentum=0", "--nesterov: must have a --momentum"),
    (
      "--accumulator-dtype=float64",
      "--accumulator-dtype: must have --dtype float64 to be float64",
    ),
    (
      "--no-sync-perturbation",
      "--no-sync-perturbation: must have --sharding shard_map",
    ),
    (
      "--num-processes=2 --process-id=0",
      "--num-processes: must come with --coordinator-address, got none",
    ),
    (
      "--coordinator-address=host --num-processes=2 --process-id=0",
      "--coordinator-address: must be a host and a port such as",
    ),
    (
      "--coordinator-address=host:1 --num-processes=2 --process-id=2",
      "--process-id: must be below --num-processes, 2, got 2. Count from 0",
    ),
    ("--launch=2 --distributed", "--launch: must be left out where"),
    ("--launch=2 --devices=1", "--devices: must be left out where"),
  ],
)
def test_a_bad_flag_is_named_with_the_remedy(words, message, capsys):
  assert message in error_of(capsys, *words.split())


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--mean=1,2,3", "--mean: must be one number, or one for each"),
    ("--model=vgg", "--model: vgg must have images of 32 x 32"),
    ("--validation=1297", "--validation: must be below the 1297"),
    ("--batch-size=1298", "--batch-size: must be at most the 1297"),
    ("--batch-size=20", "--batch-size: must split evenly over 8"),
    (
      "--devices=1 --num-microbatches=3",
      "--num-microbatches: must divide the 128 rows of a batch, got 3",
    ),
    (
      "--devices=1 --ascent-fraction=0.125",
      "--drop-last leaves out the last rows of an epoch",
    ),
    (
      "--sharding=shard_map --drop-last --ascent-fraction=0.125 "
      "--batch-size=96",
      "--ascent-fraction: must be a whole number of 12 rows",
    ),
    ("", "--drop-last: must be given where the last 17 rows"),
    ("--devices=9", "--devices: must be at most 8, got 9"),
  ],
)
def test_flags_that_do_not_fit_the_images_or_devices_are_named(
  words, message, capsys, tmp_path
):
  output = f"--output={tmp_path / 'run'}"
  found = error_of(capsys, "--data=digits", output, *words.split())
  assert message in found
  assert not (tmp_path / "run" / "seed-1").exists()


def test_data_that_are_not_there_are_named(capsys, tmp_path):
  for name, message in (
    ("no.npz", "--data: must be a file that exists"),
    ("no", "--data: must be a folder or an archive"),
  ):
    assert message in error_of(capsys, f"--data={tmp_path / name}")

"""Flags from types: what a value must be, and the sentence that refuses it."""

import dataclasses
from typing import Annotated, Optional

import pytest

from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import values

SCHEDULES = {"cosine": 1, "constant": 2}


@dataclasses.dataclass(frozen=True)
class Group:
  """Some flags.

  Attributes:
    rate: a rate.
    flip: mirror images.
  """

  rate: Annotated[
    float, values.number(0, above=True, remedy="write 0.1", metavar="R")
  ] = 0.5
  flip: bool = True


@dataclasses.dataclass(frozen=True)
class Settings:
  """All flags.

  Attributes:
    group: some flags.
    count: a number of things.
    schedule: a schedule.
    mean: of each channel.
    rho: a radius.
    part: a fraction.
  """

  group: Group = dataclasses.field(default_factory=Group)
  count: Annotated[
    Optional[int],
    values.integer(1, 9, remedy="3 is usual"),
    values.default("3"),
  ] = None
  schedule: Annotated[str, values.choice(SCHEDULES)] = "cosine"
  mean: Annotated[
    Optional[tuple[float, ...]],
    values.numbers("0.5,0.5,0.5", above=0),
  ] = None
  rho: Annotated[
    values.PerOptimizer, values.per_optimizer(("sam", "fsam"), metavar="R")
  ] = dataclasses.field(default_factory=dict)
  part: Annotated[
    float, values.number(0, 1, above=True, below=True, remedy="write 0.5")
  ] = 0.5


def parse(words):
  return flags.parse(
    Settings, words.split(), program="prog", description="Does it."
  )


def test_defaults_are_those_of_the_dataclass():
  assert parse("") == Settings()


def test_words_become_values():
  found = parse(
    "--rate 1e-3 --no-flip --count 3 --schedule constant --mean 0.5,1 "
    "--rho sam=1,fsam=2 --part=0.25"
  )
  assert found.group == Group(rate=1e-3, flip=False)
  assert found.count == 3
  assert found.schedule == "constant"
  assert found.mean == (0.5, 1.0)
  assert found.rho == {"sam": (1.0,), "fsam": (2.0,)}
  assert found.part == 0.25


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--rate 0", "--rate: must be a finite number above 0, got '0'; write 0.1"),
    ("--rate nan", "--rate: must be a finite number above 0, got 'nan'"),
    (
      "--rate 1e39",
      "--rate: must be a finite number above 0 in float32, too, where it is i",
    ),
    (
      "--rate 1e-46",
      "--rate: must be a finite number above 0 in float32, too, where it is 0",
    ),
    (
      "--part .999999999",
      "--part: must be a number in (0, 1) in float32, too, where it is 1",
    ),
    ("--rate inf", "--rate: must be a finite number above 0, got 'inf'"),
    ("--rate -1", "--rate: must be a finite number above 0, got '-1'"),
    ("--rate x", "--rate: must be a finite number above 0, got 'x'"),
    ("--part 0", r"--part: must be a number in (0, 1), got '0'"),
    ("--part 1", r"--part: must be a number in (0, 1), got '1'"),
    ("--count 0", "--count: must be an integer from 1 to 9, got '0'; 3 is us"),
    ("--count 2.5", "--count: must be an integer from 1 to 9, got '2.5'"),
    ("--schedule x", "--schedule: must be one of cosine, constant, got 'x'"),
    ("--mean 1,0", "--mean: must be numbers above 0 with commas between, that"),
    ("--mean a", "--mean: must be numbers above 0 with commas between, that"),
    ("--rho sgd=1", "--rho: must be one value or one for each of sam, fsam"),
  ],
)
def test_a_value_is_refused_in_a_sentence_with_its_flag(words, message):
  with pytest.raises(flags.FlagError) as error:
    parse(words)
  assert f"argument {message}" in str(error.value)


def test_a_registry_that_has_grown_is_looked_at_again(monkeypatch):
  monkeypatch.setitem(SCHEDULES, "linear", 3)
  assert parse("--schedule linear").schedule == "linear"


def test_help_says_defaults_and_groups(capsys):
  with pytest.raises(SystemExit) as stop:
    parse("--help")
  assert not stop.value.code
  printed = capsys.readouterr().out
  assert "Does it." in printed
  assert "group options" in printed
  assert "some flags." in printed
  assert "--flip, --no-flip" in printed
  assert "a number of things. (default: 3)" in printed


def test_what_float32_holds_is_taken():
  assert values.parse_number("1e-3", 0, remedy="") == 1e-3
  assert values.parse_number("3.4028234e38", 0, remedy="") == 3.4028234e38

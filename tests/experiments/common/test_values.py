"""Flags from types: what a value must be, and the sentence that refuses it."""

import dataclasses
from typing import Annotated, Optional

from printed import plain
import pytest

from fsam_optax.experiments.common import flags
from fsam_optax.experiments.common import values

SCHEDULES = {"cosine": 1, "constant": 2}


@dataclasses.dataclass(frozen=True)
class Group:
  """Some flags."""

  rate: Annotated[
    float, values.number(0, above=True, remedy="write 0.1", metavar="R")
  ] = 0.5


@dataclasses.dataclass(frozen=True)
class Settings:
  """All flags."""

  group: Group = dataclasses.field(default_factory=Group)
  count: Annotated[
    Optional[int],
    values.integer(1, 9, remedy="3 is usual"),
    values.default("3"),
  ] = None
  schedule: Annotated[str, values.choice(SCHEDULES)] = "cosine"
  rho: Annotated[
    values.PerOptimizer, values.per_optimizer(("sam", "fsam"), metavar="R")
  ] = dataclasses.field(default_factory=dict)
  part: Annotated[float, values.number(0, 1, above=True, below=True)] = 0.5


def parse(words):
  return flags.parse(
    Settings, words.split(), program="prog", description="Does it."
  )


def test_words_become_values():
  found = parse(
    "--rate 1e-3 --count 3 --schedule constant --rho sam=1,fsam=0.4:0.2 "
    "--part=0.25"
  )
  assert found.group == Group(rate=1e-3)
  assert found.count == 3
  assert found.schedule == "constant"
  assert found.rho == {"sam": (1.0,), "fsam": (0.2, 0.4)}
  assert found.part == 0.25


@pytest.mark.parametrize(
  ("words", "message"),
  [
    ("--rate 0", "--rate: must be a number in (0, inf), got '0'; write 0.1"),
    ("--rate inf", "--rate: must be a number in (0, inf), got 'inf'"),
    ("--rate x", "--rate: must be a number in (0, inf), got 'x'"),
    # In float32 these are 0 and 1.
    ("--rate 1e-46", "--rate: must be a number in (0, inf), got '1e-46'"),
    ("--part 0.999999999", "--part: must be a number in (0, 1), got '0.99999"),
    ("--part 1", "--part: must be a number in (0, 1), got '1'"),
    ("--count 0", "--count: must be an integer in [1, 9], got '0'; 3 is us"),
    ("--count 2.5", "--count: must be an integer in [1, 9], got '2.5'"),
    ("--schedule x", "--schedule: must be one of cosine, constant, got 'x'"),
    ("--rho sgd=1", "--rho: must be one value or one for each of sam, fsam"),
  ],
)
def test_a_value_is_refused_in_a_sentence_with_its_flag(words, message, capsys):
  with pytest.raises(SystemExit) as stop:
    parse(words)
  assert stop.value.code == 2
  assert message in plain(capsys.readouterr().err)


def test_a_registry_that_has_grown_is_looked_at_again(monkeypatch):
  monkeypatch.setitem(SCHEDULES, "linear", 3)
  assert parse("--schedule linear").schedule == "linear"

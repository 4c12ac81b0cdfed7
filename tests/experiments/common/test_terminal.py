"""What reaches the terminal."""

import os
import sys

import pytest

from fsam_optax.experiments.common import terminal


@pytest.mark.parametrize(
  ("text", "shown"),
  [
    ("plain, é and 数", "plain, é and 数"),
    ("\x1b[31mred", r"\x1b[31mred"),
    ("two\nlines\r", r"two\nlines\r"),
    ("\x9b2J", r"\x9b2J"),
    (3, "3"),
  ],
)
def test_what_steers_a_terminal_is_spelled_out(text, shown):
  assert terminal.printable(text) == shown


def test_a_closed_stdout_is_outlived(capfd, monkeypatch):
  reading, writing = os.pipe()
  with os.fdopen(writing, "w", buffering=1) as stream:
    monkeypatch.setattr(sys, "stdout", stream)
    with terminal.outliving_stdout():
      print("heard", flush=True)
      assert os.read(reading, 100) == b"heard\n"
      os.close(reading)
      for _ in range(3):
        print("to nobody", flush=True)
    assert sys.stdout is stream
  assert capfd.readouterr().err == "stdout was closed; going on\n"

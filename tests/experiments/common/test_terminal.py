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


def test_both_streams_may_be_closed(monkeypatch):
  """As by ``2>&1 | head``."""
  reading, writing = os.pipe()
  both = [os.fdopen(os.dup(writing), "w", buffering=1) for _ in range(2)]
  os.close(writing)
  monkeypatch.setattr(sys, "stdout", both[0])
  monkeypatch.setattr(sys, "stderr", both[1])
  with terminal.outliving_streams():
    os.close(reading)
    for stream in (sys.stdout, sys.stderr):
      print("to nobody", file=stream, flush=True)
      print("to nobody", file=stream, flush=True)
      # Where it goes from now on.
      assert os.readlink(f"/proc/self/fd/{stream.fileno()}") == os.devnull
  for stream in both:
    stream.close()

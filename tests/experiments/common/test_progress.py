"""Progress bars where there is a terminal, lines where there is none."""

import io
import sys

from fsam_optax.experiments.common import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_without_a_terminal_nothing_but_lines_is_shown(capsys):
  with progress.Bars() as bars:
    advance = bars.start("SAM", 3)
    advance()
    advance(2, text="loss 1.0")
    bars.print("one line")
  assert capsys.readouterr().out == "one line\n"


def test_a_terminal_sees_title_steps_text_and_lines(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, "stdout", terminal)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  with progress.Bars() as bars:
    advance = bars.start("SAM", 4, done=1)
    advance(2, text="loss 1.0")
    advance()
    bars.print("one [line]")
  shown = terminal.getvalue()
  assert "SAM" in shown
  assert "4/4" in shown
  assert "one [line]" in shown

"""``python -m fsam_optax``: its help, its errors and what it needs."""

import signal
import subprocess
import sys

import jax
import pytest

from fsam_optax.__main__ import main

COMMANDS = ("compare", "tune", "study", "train")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_a_help(command, capsys):
  with pytest.raises(SystemExit) as stop:
    main([command, "--help"])
  assert not stop.value.code
  printed = capsys.readouterr().out
  assert "\x1b" not in printed
  assert "--output" in printed
  assert f"usage: python -m fsam_optax {command}" in printed


@pytest.mark.parametrize("words", [["--help"], []])
def test_overview_names_every_command(words, capsys):
  main(words)
  printed = capsys.readouterr().out
  assert all(f"\n  {command} " in printed for command in COMMANDS)
  assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize(
  ("word", "remedy"),
  [("compaer", "did you mean compare?"), ("--seeds", "--help says what they")],
)
def test_what_is_no_command_ends_with_those_there_are(word, remedy, capsys):
  with pytest.raises(SystemExit) as stop:
    main([word])
  assert stop.value.code == 2
  error = capsys.readouterr().err
  message = "COMMAND must be one of compare, tune, study, train, got"
  assert f"{message} {word!r}; {remedy}" in error
  assert error.count("\n") == 1


def test_a_run_without_compiling_is_refused(capsys):
  with jax.disable_jit(), pytest.raises(SystemExit):
    main(["train", "--data", "digits"])
  assert "error: JAX_DISABLE_JIT must not be set" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tyro", "matplotlib"])
def test_a_missing_package_is_one_line_with_its_remedy(name):
  code = f"import sys; sys.modules[{name!r}] = None\n"
  code += "from fsam_optax import __main__; __main__.main(['compare'])"
  process = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert process.returncode == 1
  assert f"the experiments need {name}, which" in process.stderr
  assert 'pip install -e ".[experiments]"' in process.stderr
  assert process.stderr.count("\n") == 1


@pytest.mark.slow
def test_control_c_ends_a_search_at_once(tmp_path):
  command = "import signal; signal.signal(signal.SIGINT, signal.default_int_"
  command += "handler); from fsam_optax import __main__; __main__.main("
  command += f"['tune', '--data', 'digits', '--output', {str(tmp_path)!r}])"
  with subprocess.Popen(
    [sys.executable, "-u", "-c", command],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    process.stdout.readline()  # It compiles the first runs after this line.
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
  assert process.returncode == 130
  assert errors.rstrip().endswith("python -m fsam_optax: interrupted")

"""How real processes of ``train`` are started; a file may have FLAGS."""

import os
import subprocess
import sys

import numpy as np
import pytest

from fsam_optax.experiments import data


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
  """Programs are compiled once, and read from there by the later processes."""
  compiled = tmp_path_factory.getbasetemp().parent / "compiled"
  return {
    **os.environ,
    "JAX_COMPILATION_CACHE_DIR": str(compiled),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PLATFORMS": "cpu",
  }


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
  """The digits of scikit-learn, which takes long to import, as arrays."""
  images = data.load("digits")
  names = ("x_train", "y_train", "x_test", "y_test")
  path = tmp_path_factory.mktemp("data") / "digits.npz"
  np.savez(path, **{name: getattr(images, name) for name in names})
  return path


@pytest.fixture(scope="module")
def command(request, digits):
  """The words of a command; of a flag that is given again the last counts."""
  train = (sys.executable, "-m", "fsam_optax", "train", f"--data={digits}")
  common = getattr(request.module, "FLAGS", ())
  return lambda output, *flags: [*train, f"--output={output}", *common, *flags]


@pytest.fixture(scope="module")
def start(environment, command):
  """Starts that command, and kills what a failed test left."""
  started = []

  def start(output, *flags, **variables):
    # A process inherits what its parent ignores: a hangup by nohup, an
    # interrupt in a shell's background.
    process = subprocess.Popen(
      ["env", "--default-signal=HUP,INT", *command(output, *flags)],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      env={**environment, **variables},
    )
    started.append(process)
    return process

  yield start
  for process in started:
    process.kill()
    process.wait()
    process.stdout.close()

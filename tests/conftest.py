"""Eight CPU devices, float64 where a test asks for it, one small problem.

`pytest -m device --device gpu` holds what is marked `device` on the GPU (or
"tpu") of this machine, in float32 and by the tolerances of that;
benchmarks/accelerator.py calls it. `--device cpu` is the rehearsal.
"""

import os
from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest
from versions import enable_x64


def pytest_addoption(parser):
  parser.addoption("--device", choices=("cpu", "gpu", "tpu"))


def pytest_configure(config):
  # Before anything starts the backend.
  jax.config.update("jax_num_cpu_devices", 8)
  device = config.getoption("--device")
  if device is None:
    # Nearly all the time is compilation: a third less without optimizations.
    # With JAX_DISABLE_MOST_OPTIMIZATIONS=0 it is as a user has it.
    if "JAX_DISABLE_MOST_OPTIMIZATIONS" not in os.environ:
      jax.config.update("jax_disable_most_optimizations", True)
    # And what one run compiled the next one reads: `--cache-clear` forgets it.
    if hasattr(config, "cache"):
      compiled = str(config.cache.mkdir("compiled"))
      jax.config.update("jax_compilation_cache_dir", compiled)
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  else:
    # Products in float32: not in TF32, nor in the bfloat16 of a TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    if jax.default_backend() != device:
      raise pytest.UsageError(
        f"`--device` must be a device that JAX finds, got {device}. It finds: "
        f"{jax.default_backend()}."
      )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
  """Deals out whole files, whose tests share what they compile."""
  from xdist.scheduler import LoadFileScheduling

  return LoadFileScheduling(config, log)


@pytest.fixture(scope="session")
def device(request) -> str | None:
  """What `--device` names; None is this project's CPU, where all is exact."""
  return request.config.getoption("--device")


class Problem(NamedTuple):
  """A two-layer regression with its batches."""

  params: dict[str, Any]
  batches: tuple[jax.Array, jax.Array]  # Shapes [T, B, 3] and [T, B, 2].
  loss_fn: Callable[[Any, Any], jax.Array]

  def batch(self, t: int):
    return jax.tree.map(lambda x: x[t], self.batches)

  def gradients(self, number: int):
    """Gradients at the initial parameters, one a batch, as a list."""
    return [gradient_of(self.params, self.batch(t)) for t in range(number)]

  def train(self, tx, steps=None, **extra):
    """Parameters and state after a pass over the batches, or the first ones."""

    def step(carry, batch):
      params, state = carry
      grad_fn = jax.grad(lambda p: self.loss_fn(p, batch))
      updates, state = tx.update(
        grad_fn(params), state, params, grad_fn=grad_fn, **extra
      )
      return (optax.apply_updates(params, updates), state), None

    batches = jax.tree.map(lambda x: x[:steps], self.batches)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches)[0])
    return run((self.params, tx.init(self.params)))


def regression_loss(params, batch):
  inputs, targets = batch
  hidden = jnp.tanh(inputs @ params["hidden"]["kernel"])
  hidden = hidden + params["hidden"]["bias"]
  return jnp.mean((hidden @ params["output"] - targets) ** 2)


gradient_of = jax.jit(jax.grad(regression_loss))


@pytest.fixture(scope="session")
def problem() -> Problem:
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return Problem(
    params={
      "hidden": {"kernel": draw(3, 4), "bias": draw(4)},
      "output": draw(4, 2),
    },
    batches=(draw(30, 8, 3), draw(30, 8, 2)),
    loss_fn=regression_loss,
  )


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def platform(request):
  """What is chosen by the platform, as a CPU and as a GPU chooses it."""
  with pytest.MonkeyPatch.context() as patch:
    if request.param == "gpu":
      patch.setattr(
        jax.lax,
        "platform_dependent",
        lambda *args, default, **_: default(*args),
      )
    yield request.param


@pytest.fixture
def x64():
  """Double precision for one test."""
  with enable_x64(True):
    yield


@pytest.fixture
def widest(device):
  """The dtype that formulas are held in; of a device, what it computes in."""
  with enable_x64(device is None):
    yield jnp.dtype("float64" if device is None else "float32")


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request, device):
  """Each floating dtype in turn, with double precision where it needs it."""
  if request.param == "float64" and device:
    pytest.skip("A device computes in float32.")
  with enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)

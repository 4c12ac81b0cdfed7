"""Eight CPU devices, float64 where a test asks for it, one small problem."""

from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import pytest
from versions import enable_x64

# Before anything starts the backend.
jax.config.update("jax_num_cpu_devices", 8)


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


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
  """Each floating dtype in turn, with double precision where it needs it."""
  with enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)

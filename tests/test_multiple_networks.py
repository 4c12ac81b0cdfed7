"""Two networks, two losses, two steps: each step is about its own network."""

from by_hand import LMBDA
from by_hand import RHO
from by_hand import ByHand
from faces import state_of
from faces import step_of
import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax

SGD = optax.sgd(0.05)


def draw(seed, *shape):
  return jnp.array(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def network(params, inputs):
  return jnp.tanh(inputs @ params["hidden"]) @ params["output"]


def make_params(seed, inputs, outputs):
  return {
    "hidden": draw((seed, 0), inputs, 5),
    "output": draw((seed, 1), 5, outputs),
  }


# The other network comes with the batch.


def discriminator_loss(params, batch):
  fake = network(batch["generator"], batch["noise"])
  loss = jnp.mean(jax.nn.softplus(-network(params, batch["real"])))
  return loss + jnp.mean(jax.nn.softplus(network(params, fake)))


def generator_loss(params, batch):
  fake = network(params, batch["noise"])
  return jnp.mean(jax.nn.softplus(-network(batch["discriminator"], fake)))


def make_state(params):
  return state_of(
    params, fsam_optax.friendly_perturbation(RHO, lmbda=LMBDA), SGD
  )


def gradient_of(loss_fn, batch):
  return jax.jit(jax.grad(lambda params: loss_fn(params, batch)))


def test_alternating_gan_steps_are_the_two_passes_by_hand():
  generator, discriminator = make_params(0, 2, 3), make_params(1, 3, 1)
  batch_of = lambda t: {"real": draw((2, t), 8, 3), "noise": draw((3, t), 8, 2)}
  own_generator = ByHand(generator, SGD)
  own_discriminator = ByHand(discriminator, SGD)
  states = {
    "generator": make_state(generator),
    "discriminator": make_state(discriminator),
  }
  traces = []

  def counted(loss_fn):
    return lambda *args: (traces.append(None), loss_fn(*args))[1]

  generator_step = step_of(counted(generator_loss))
  discriminator_step = step_of(counted(discriminator_loss))
  for t in range(3):
    batch = batch_of(t) | {"generator": states["generator"].params}
    states["discriminator"], _ = discriminator_step(
      states["discriminator"], batch
    )
    batch = batch_of(t) | {"discriminator": states["discriminator"].params}
    states["generator"], metrics = generator_step(states["generator"], batch)
    # Each has a norm and an average of its own.
    np.testing.assert_allclose(metrics["perturbation_norm"], RHO, rtol=1e-5)
    batch = batch_of(t) | {"generator": own_generator.params}
    own_discriminator.step(gradient_of(discriminator_loss, batch))
    batch = batch_of(t) | {"discriminator": own_discriminator.params}
    own_generator.step(gradient_of(generator_loss, batch))
  own_generator.assert_followed_by(states["generator"].params)
  own_discriminator.assert_followed_by(states["discriminator"].params)
  # The other network is an input, not a constant: it never compiles anew.
  assert len(traces) == 2

"""Two networks, two losses, two steps: each step is about its own network."""

import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

RHO, SIGMA, LMBDA, LEARNING_RATE = 0.1, 1.0, 0.9, 0.05


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


def discriminator_loss(params, model_state, batch, rng):
  del rng
  fake = network(batch["generator"], batch["noise"])
  loss = jnp.mean(jax.nn.softplus(-network(params, batch["real"])))
  loss += jnp.mean(jax.nn.softplus(network(params, fake)))
  return loss, (model_state, {})


def generator_loss(params, model_state, batch, rng):
  del rng
  fake = network(params, batch["noise"])
  loss = jnp.mean(jax.nn.softplus(-network(batch["discriminator"], fake)))
  return loss, (model_state, {})


def critic_loss(params, model_state, batch, rng):
  """Squared temporal difference, with a bootstrapped target."""
  del rng
  target = batch["reward"] + 0.9 * network(params, batch["next"])[:, 0]
  value = network(params, batch["now"])[:, 0]
  loss = jnp.mean((jax.lax.stop_gradient(target) - value) ** 2)
  return loss, (model_state, {})


def actor_loss(params, model_state, batch, rng):
  """Policy gradient with the critic's advantage."""
  del rng
  value = lambda x: network(batch["critic"], x)[:, 0]
  advantage = batch["reward"] + 0.9 * value(batch["next"]) - value(batch["now"])
  log_policy = jax.nn.log_softmax(network(params, batch["now"]))
  chosen = jnp.take_along_axis(log_policy, batch["action"][:, None], 1)[:, 0]
  loss = -jnp.mean(jax.lax.stop_gradient(advantage) * chosen)
  return loss, (model_state, {})


def make_state(params):
  return fsam_optax.TrainState.create(
    apply_fn=network,
    params=params,
    tx=optax.sgd(LEARNING_RATE),
    perturbation=fsam_optax.friendly_perturbation(RHO, SIGMA, LMBDA),
  )


@pytest.fixture
def gan():
  """Generator, discriminator, and the batch of a step."""
  batch = lambda t: {"real": draw((2, t), 8, 3), "noise": draw((3, t), 8, 2)}
  return make_params(0, 2, 3), make_params(1, 3, 1), batch


@pytest.fixture
def actor_critic():
  """Actor, critic, and the transitions of a step."""
  transitions = lambda t: {
    "now": draw((6, t), 8, 3),
    "next": draw((7, t), 8, 3),
    "reward": draw((8, t), 8),
    "action": jnp.arange(8) % 4,
  }
  return make_params(4, 3, 4), make_params(5, 3, 1), transitions


def by_hand(loss_fn, params, ema, batch):
  """F-SAM and SGD from the equations; returns the parameters and the EMA."""
  grad_fn = jax.grad(lambda p: loss_fn(p, None, batch, None)[0])
  gradient = grad_fn(params)
  if ema is None:
    direction, ema = gradient, gradient
  else:
    direction = jax.tree.map(lambda g, m: g - SIGMA * m, gradient, ema)
    ema = jax.tree.map(lambda g, m: LMBDA * m + (1 - LMBDA) * g, gradient, ema)
  norm = sum(np.sum(np.square(d)) for d in jax.tree.leaves(direction)) ** 0.5
  perturbed = jax.tree.map(lambda p, d: p + RHO * d / norm, params, direction)
  params = jax.tree.map(
    lambda p, g: p - LEARNING_RATE * g, params, grad_fn(perturbed)
  )
  return params, ema


def assert_close(found, expected):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6),
    found,
    expected,
  )


def assert_equal(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_alternating_gan_steps_are_the_two_passes_by_hand(gan):
  generator, discriminator, batch_of = gan
  traces = []

  def counted(loss_fn):
    def counted_fn(*args):
      traces.append(loss_fn)
      return loss_fn(*args)

    return counted_fn

  generator_step = fsam_optax.make_train_step(counted(generator_loss))
  discriminator_step = fsam_optax.make_train_step(counted(discriminator_loss))
  generator_state = make_state(jax.tree.map(jnp.copy, generator))
  discriminator_state = make_state(jax.tree.map(jnp.copy, discriminator))
  generator_ema = discriminator_ema = None
  for t in range(3):
    batch = batch_of(t)
    discriminator_state, _ = discriminator_step(
      discriminator_state, {**batch, "generator": generator_state.params}
    )
    discriminator, discriminator_ema = by_hand(
      discriminator_loss,
      discriminator,
      discriminator_ema,
      {**batch, "generator": generator},
    )
    generator_state, _ = generator_step(
      generator_state, {**batch, "discriminator": discriminator_state.params}
    )
    generator, generator_ema = by_hand(
      generator_loss,
      generator,
      generator_ema,
      {**batch, "discriminator": discriminator},
    )
    if t == 0:
      compiled = len(traces)
  assert_close(generator_state.params, generator)
  assert_close(discriminator_state.params, discriminator)
  # The other network is an input, not a constant: it never compiles anew.
  assert len(traces) == compiled


@pytest.mark.parametrize("jit", [True, False])
def test_a_step_changes_its_own_network_alone(gan, jit):
  generator, discriminator, batch_of = gan
  generator_state, discriminator_state = map(
    lambda params: make_state(jax.tree.map(jnp.copy, params)),
    (generator, discriminator),
  )
  before = jax.tree.map(np.array, discriminator_state)
  step = fsam_optax.make_train_step(generator_loss, jit=jit)
  generator_state, _ = step(
    generator_state,
    {**batch_of(0), "discriminator": discriminator_state.params},
  )
  assert_equal(discriminator_state, before)
  for old, new in zip(
    jax.tree.leaves(generator),
    jax.tree.leaves(generator_state.params),
    strict=True,
  ):
    assert np.any(old != new)


def test_both_passes_see_the_other_network_unperturbed(gan):
  generator, discriminator, batch_of = gan
  seen = []

  def watched_loss(params, model_state, batch, rng):
    jax.debug.callback(
      lambda *trees: seen.append(jax.tree.map(np.array, trees)),
      params,
      batch["discriminator"],
    )
    return generator_loss(params, model_state, batch, rng)

  step = fsam_optax.make_train_step(watched_loss)
  state, metrics = step(
    make_state(jax.tree.map(jnp.copy, generator)),
    {**batch_of(0), "discriminator": discriminator},
  )
  jax.block_until_ready((state, metrics))
  jax.effects_barrier()
  assert len(seen) == 2
  for _, other in seen:
    assert_equal(other, discriminator)
  distance = lambda own: (
    sum(np.sum((own[name] - np.asarray(generator[name])) ** 2) for name in own)
    ** 0.5
  )
  distances = sorted(distance(own) for own, _ in seen)
  np.testing.assert_allclose(distances, [0.0, RHO], rtol=1e-4)


def test_simultaneous_actor_critic_steps_are_the_two_passes_by_hand(
  actor_critic,
):
  """Both from the old parameters: two pure steps inside one jit."""
  actor, critic, transitions_of = actor_critic
  actor_step = fsam_optax.make_train_step(actor_loss, jit=False)
  critic_step = fsam_optax.make_train_step(critic_loss, jit=False)

  @jax.jit
  def both(actor_state, critic_state, transitions):
    new_actor_state, _ = actor_step(
      actor_state, {**transitions, "critic": critic_state.params}
    )
    new_critic_state, _ = critic_step(critic_state, transitions)
    return new_actor_state, new_critic_state

  actor_state, critic_state = make_state(actor), make_state(critic)
  actor_ema = critic_ema = None
  for t in range(3):
    transitions = transitions_of(t)
    actor_state, critic_state = both(actor_state, critic_state, transitions)
    with_critic = {**transitions, "critic": critic}
    actor, actor_ema = by_hand(actor_loss, actor, actor_ema, with_critic)
    critic, critic_ema = by_hand(critic_loss, critic, critic_ema, transitions)
  assert_close(actor_state.params, actor)
  assert_close(critic_state.params, critic)


def test_networks_keep_averages_and_norms_of_their_own(gan):
  """One state over both parameter trees would share the norm; two do not."""
  generator, discriminator, batch_of = gan
  step = fsam_optax.make_train_step(generator_loss, jit=False)
  batch = {**batch_of(0), "discriminator": discriminator}
  state, metrics = step(make_state(generator), batch)
  np.testing.assert_allclose(metrics["perturbation_norm"], RHO, rtol=1e-5)
  gradient = jax.grad(lambda p: generator_loss(p, None, batch, None)[0])(
    generator
  )
  assert_close(state.perturbation_state[0].ema, gradient)


def test_a_perturbed_player_may_meet_a_plain_one(gan):
  generator, discriminator, batch_of = gan
  state = fsam_optax.TrainState.create(
    apply_fn=network,
    params=generator,
    tx=optax.sgd(LEARNING_RATE),
    perturbation=None,
  )
  batch = {**batch_of(0), "discriminator": discriminator}
  step = fsam_optax.make_train_step(generator_loss, jit=False)
  state, _ = step(state, batch)
  gradient = jax.grad(lambda p: generator_loss(p, None, batch, None)[0])(
    generator
  )
  assert_close(
    state.params,
    jax.tree.map(lambda p, g: p - LEARNING_RATE * g, generator, gradient),
  )

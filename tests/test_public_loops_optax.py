"""Training programs as people publish them, with F-SAM put in: optax loops.

Each is written down in the form that its kind has in public, adopts F-SAM in
the lines that its docstring counts, and must do what the equations do.
"""

import functools
from typing import NamedTuple

from by_hand import LMBDA
from by_hand import RHO
from by_hand import ByHand
from by_hand import assert_close
from by_hand import flat
import equinox as eqx
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

pytestmark = pytest.mark.slow

STEPS = 3


def fsam(**kwargs):
  return fsam_optax.fsam(rho=RHO, lmbda=LMBDA, **kwargs)


@pytest.fixture(scope="module")
def batches():
  """Eight rows of four features with a target each, a batch a step."""
  draw = np.random.default_rng(1).normal
  return [
    (
      jnp.asarray(draw(size=(8, 4)), jnp.float32),
      jnp.asarray(draw(size=8), jnp.float32),
    )
    for _ in range(STEPS)
  ]


def random_tree(seed, **shapes):
  draw = np.random.default_rng(seed).normal
  return {
    name: jnp.asarray(0.5 * draw(size=shape), jnp.float32)
    for name, shape in shapes.items()
  }


# PPO with everything in nested scans, over a vmap of seeds.

ENVS, LENGTH, UPDATES, EPOCHS, MINIBATCHES = 4, 6, 2, 2, 2
GAMMA, GAE, CLIP = 0.9, 0.8, 0.2


class ActorCritic(nn.Module):
  @nn.compact
  def __call__(self, x):
    logits = nn.Dense(2)(nn.tanh(nn.Dense(8)(x)))
    value = nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))
    return logits, value[..., 0]


class Transition(NamedTuple):
  observation: jax.Array
  action: jax.Array
  log_prob: jax.Array
  value: jax.Array
  reward: jax.Array
  done: jax.Array


ACTOR_CRITIC = ActorCritic()


def observe(position):
  return jnp.stack([position, position**2], axis=-1)


def walk(key, position, action):
  """A walker that is paid for staying near the origin, and restarts far off."""
  noise = 0.1 * jax.random.normal(key, position.shape)
  position = position + 0.3 * (2 * action - 1) + noise
  done = jnp.abs(position) > 1
  return jnp.where(done, 0.0, position), 1 - jnp.abs(position), done


def log_prob_of(logits, action):
  log_probs = jax.nn.log_softmax(logits)
  return jnp.take_along_axis(log_probs, action[..., None], -1)[..., 0]


def collect(key, params, position):
  """A rollout, with advantages and targets."""

  def env_step(position, key):
    keys = jax.random.split(key)
    logits, value = ACTOR_CRITIC.apply(params, observe(position))
    action = jax.random.categorical(keys[0], logits)
    moved, reward, done = walk(keys[1], position, action)
    log_prob = log_prob_of(logits, action)
    return moved, Transition(
      observe(position), action, log_prob, value, reward, done
    )

  position, steps = jax.lax.scan(
    env_step, position, jax.random.split(key, LENGTH)
  )
  last_value = ACTOR_CRITIC.apply(params, observe(position))[1]

  def backwards(carry, step):
    advantage, next_value = carry
    alive = 1 - step.done
    delta = step.reward + GAMMA * next_value * alive - step.value
    advantage = delta + GAMMA * GAE * alive * advantage
    return (advantage, step.value), advantage

  _, advantages = jax.lax.scan(
    backwards, (jnp.zeros(ENVS), last_value), steps, reverse=True
  )
  return position, (steps, advantages, advantages + steps.value)


def shuffled(key, batch):
  """The rollout's steps in random order, an axis of minibatches in front."""
  order = jax.random.permutation(key, ENVS * LENGTH)

  def split(x):
    x = x.reshape(ENVS * LENGTH, *x.shape[2:])[order]
    return x.reshape(MINIBATCHES, -1, *x.shape[1:])

  return jax.tree.map(split, batch)


def ppo_loss(params, steps, advantages, targets):
  logits, value = ACTOR_CRITIC.apply(params, steps.observation)
  ratio = jnp.exp(log_prob_of(logits, steps.action) - steps.log_prob)
  advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
  surrogate = jnp.minimum(
    ratio * advantages, jnp.clip(ratio, 1 - CLIP, 1 + CLIP) * advantages
  )
  clipped = steps.value + jnp.clip(value - steps.value, -CLIP, CLIP)
  value_loss = jnp.maximum((value - targets) ** 2, (clipped - targets) ** 2)
  probs = jax.nn.softmax(logits)
  entropy = -jnp.sum(probs * jax.nn.log_softmax(logits), axis=-1)
  return jnp.mean(-surrogate + 0.25 * value_loss - 0.01 * entropy)


def ppo_base():
  return optax.chain(optax.clip_by_global_norm(0.5), optax.adam(5e-3, eps=1e-5))


def ppo_train(key):
  key, init_key = jax.random.split(key)
  state = fsam_optax.TrainState.create(
    apply_fn=ACTOR_CRITIC.apply,
    params=ACTOR_CRITIC.init(init_key, jnp.zeros(2)),
    tx=optax.chain(fsam(), ppo_base()),
    perturbation=None,
  )

  def update_step(carry, _):
    state, position, key = carry
    key, rollout_key, epoch_key = jax.random.split(key, 3)
    position, batch = collect(rollout_key, state.params, position)

    def epoch(state, key):
      def minibatch_step(state, minibatch):
        grad_fn = jax.grad(lambda params: ppo_loss(params, *minibatch))
        grads = grad_fn(state.params)
        return state.apply_gradients(grads=grads, grad_fn=grad_fn), None

      return jax.lax.scan(minibatch_step, state, shuffled(key, batch))

    keys = jax.random.split(epoch_key, EPOCHS)
    state, _ = jax.lax.scan(epoch, state, keys)
    return (state, position, key), batch[0].reward.mean()

  carry = (state, jnp.zeros(ENVS), key)
  (state, *_), rewards = jax.lax.scan(update_step, carry, length=UPDATES)
  return state, rewards


def test_ppo_of_many_seeds_in_one_program():
  """PureJaxRL's kind: scans in scans under a vmap; 4 lines change."""
  seeds = jax.random.split(jax.random.key(0), 2)
  state, rewards = jax.jit(jax.vmap(ppo_train))(seeds)
  assert rewards.shape == (2, UPDATES)
  gradient = jax.jit(jax.grad(ppo_loss))
  run, shuffle, base = jax.jit(collect), jax.jit(shuffled), ppo_base()
  for seed, key in enumerate(seeds):
    key, init_key = jax.random.split(key)
    by_hand = ByHand(ACTOR_CRITIC.init(init_key, jnp.zeros(2)), base)
    position = jnp.zeros(ENVS)
    for _ in range(UPDATES):
      key, rollout_key, epochs_key = jax.random.split(key, 3)
      position, batch = run(rollout_key, by_hand.params, position)
      for epoch_key in jax.random.split(epochs_key, EPOCHS):
        minibatches = shuffle(epoch_key, batch)
        for i in range(MINIBATCHES):
          part = jax.tree.map(lambda x, i=i: x[i], minibatches)
          by_hand.step(lambda p, part=part: gradient(p, *part))
    found = jax.tree.map(lambda x, seed=seed: x[seed], state)
    by_hand.assert_followed_by(found.params, tolerance=5e-5)
    assert found.step == UPDATES * EPOCHS * MINIBATCHES


# A GAN of Equinox modules.


def generate(generator, noise):
  return jax.vmap(generator)(noise)


def discriminator_loss(discriminator, generator, real, noise):
  judge = jax.vmap(discriminator)
  return jnp.mean(jax.nn.softplus(-judge(real))) + jnp.mean(
    jax.nn.softplus(judge(generate(generator, noise)))
  )


def generator_loss(generator, discriminator, noise):
  judged = jax.vmap(discriminator)(generate(generator, noise))
  return jnp.mean(jax.nn.softplus(-judged))


GAN_BASE = optax.adam(0.02, b1=0.5)


@eqx.filter_jit
def gan_update(loss_fn, model, opt_state, *args):
  params, static = eqx.partition(model, eqx.is_inexact_array)
  grad_fn = lambda p: eqx.filter_grad(loss_fn)(eqx.combine(p, static), *args)
  grads = eqx.filter_grad(loss_fn)(model, *args)
  tx = optax.chain(fsam(), GAN_BASE)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return eqx.apply_updates(model, updates), opt_state


def two_layers(params, x):
  first, first_bias, second, second_bias = jax.tree.leaves(params)
  outputs = jnp.tanh(x @ first.T + first_bias) @ second.T + second_bias
  return outputs[..., 0] if outputs.shape[-1] == 1 else outputs


def plain_discriminator_loss(params, generator, real, noise):
  judge = functools.partial(two_layers, params)
  fake = judge(two_layers(generator, noise))
  return jnp.mean(jnp.log1p(jnp.exp(-judge(real))) + jnp.log1p(jnp.exp(fake)))


def plain_generator_loss(params, discriminator, noise):
  fake = two_layers(discriminator, two_layers(params, noise))
  return jnp.mean(jnp.log1p(jnp.exp(-fake)))


def test_a_gan_of_two_equinox_modules(batches):
  """Equinox's GAN: two models, two chains; 4 lines change for each."""
  keys = jax.random.split(jax.random.key(0))
  mlp = functools.partial(
    eqx.nn.MLP, width_size=6, depth=1, activation=jnp.tanh
  )
  generator = mlp(2, 4, key=keys[0])
  discriminator = mlp(4, "scalar", key=keys[1])
  arrays = lambda model: eqx.filter(model, eqx.is_inexact_array)
  tx = optax.chain(fsam(), GAN_BASE)
  states = [tx.init(arrays(model)) for model in (generator, discriminator)]
  leaves = lambda model: jax.tree.leaves(arrays(model))
  own_generator = ByHand(leaves(generator), GAN_BASE)
  own_discriminator = ByHand(leaves(discriminator), GAN_BASE)
  d_gradient = jax.jit(jax.grad(plain_discriminator_loss))
  g_gradient = jax.jit(jax.grad(plain_generator_loss))
  for real, _ in batches:
    noise = real[:, :2] ** 2
    discriminator, states[1] = gan_update(
      discriminator_loss, discriminator, states[1], generator, real, noise
    )
    generator, states[0] = gan_update(
      generator_loss, generator, states[0], discriminator, noise
    )
    other = own_generator.params
    own_discriminator.step(
      lambda p, other=other, args=(real, noise): d_gradient(p, other, *args)
    )
    other = own_discriminator.params
    own_generator.step(
      lambda p, other=other, noise=noise: g_gradient(p, other, noise)
    )
  own_generator.assert_followed_by(arrays(generator))
  own_discriminator.assert_followed_by(arrays(discriminator))


# Adapters and frozen weights in one tree.


def adapted_outputs(params, x):
  base, lora = params["base"], params["lora"]
  hidden = jnp.tanh(x @ (base["first"] + lora["a"] @ lora["b"]))
  return hidden @ base["second"]


def adapted_loss(params, batch):
  return jnp.mean((adapted_outputs(params, batch[0]) - batch[1]) ** 2)


@pytest.fixture(scope="module")
def adapted():
  """Parameters with weights far larger than their adapters."""
  return {
    "base": random_tree(2, first=(4, 8), second=(8,)),
    "lora": random_tree(3, a=(4, 2), b=(2, 8)),
  }


adapted_gradient = jax.jit(jax.grad(adapted_loss))


def is_adapter(tree):
  return {
    name: jax.tree.map(lambda _, name=name: name == "lora", part)
    for name, part in tree.items()
  }


def adapted_by_hand(params, base, batches):
  """F-SAM over a tree that holds the adapters alone."""
  by_hand = ByHand(params["lora"], base)
  for batch in batches:
    by_hand.step(
      lambda p, batch=batch: adapted_gradient({**params, "lora": p}, batch)[
        "lora"
      ]
    )
  return by_hand


@functools.partial(jax.jit, static_argnames="tx")
def chained_step(tx, params, opt_state, batch):
  grad_fn = lambda p: jax.grad(adapted_loss)(p, batch)
  grads = grad_fn(params)
  updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
  return optax.apply_updates(params, updates), opt_state


def test_adapters_by_a_mask_over_one_tree(adapted, batches):
  """LoRA by `optax.masked`: the base stays bit for bit; 2 lines change."""
  frozen = lambda tree: jax.tree.map(lambda x: not x, is_adapter(tree))
  tx = optax.chain(
    fsam(mask=fsam_optax.masks.by_path("lora")),
    optax.masked(optax.adamw(0.05), is_adapter),
    optax.masked(optax.set_to_zero(), frozen),
  )
  params, opt_state = adapted, tx.init(adapted)
  for batch in batches:
    params, opt_state = chained_step(tx, params, opt_state, batch)
  by_hand = adapted_by_hand(adapted, optax.adamw(0.05), batches)
  by_hand.assert_followed_by(params["lora"])
  jax.tree.map(np.testing.assert_array_equal, params["base"], adapted["base"])


def test_adapters_over_a_base_in_a_closure(adapted, batches):
  """LoRA with the base closed over: no mask needed; 2 lines change."""
  base = adapted["base"]
  tx = optax.chain(fsam(), optax.adamw(0.05))
  lora = adapted["lora"]
  opt_state = tx.init(lora)

  @jax.jit
  def step(lora, opt_state, batch):
    loss_fn = lambda lora: adapted_loss({"base": base, "lora": lora}, batch)
    grads = jax.grad(loss_fn)(lora)
    updates, opt_state = tx.update(
      grads, opt_state, lora, grad_fn=jax.grad(loss_fn)
    )
    return optax.apply_updates(lora, updates), opt_state

  for batch in batches:
    lora, opt_state = step(lora, opt_state, batch)
  by_hand = adapted_by_hand(adapted, optax.adamw(0.05), batches)
  by_hand.assert_followed_by(lora)


def test_a_partition_of_trained_and_frozen_leaves(adapted, batches):
  """Transfer learning by `optax.partition`: 2 lines, with a mask as labels."""
  labels = lambda tree: jax.tree.map(
    lambda trained: "trained" if trained else "frozen", is_adapter(tree)
  )
  tx = optax.chain(
    fsam(mask=is_adapter),
    optax.partition(
      {"trained": optax.adam(0.05), "frozen": optax.set_to_zero()}, labels
    ),
  )
  params, opt_state = adapted, tx.init(adapted)
  for batch in batches:
    seen = []

    def grad_fn(p, batch=batch, seen=seen):
      seen.append(p)
      return adapted_gradient(p, batch)

    grads = grad_fn(params)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    _, perturbed = seen
    # The frozen leaves stay where they are, and fill nothing of the radius.
    moved = flat(perturbed["lora"]) - flat(params["lora"])
    np.testing.assert_allclose(np.linalg.norm(moved), RHO, rtol=1e-5)
    jax.tree.map(
      np.testing.assert_array_equal, perturbed["base"], params["base"]
    )
    params = optax.apply_updates(params, updates)
  by_hand = adapted_by_hand(adapted, optax.adam(0.05), batches)
  by_hand.assert_followed_by(params["lora"])
  jax.tree.map(np.testing.assert_array_equal, params["base"], adapted["base"])


# A transformed function in the form of Haiku, with a static loss scale.

LOSS_SCALE = 2.0**12


class Transformed(NamedTuple):
  """The pair of functions that a forward pass with state is turned into."""

  init: object
  apply: object


def make_transformed():
  def init(key, x):
    keys = jax.random.split(key)
    draw = lambda key, n, m: jax.random.normal(key, (n, m)) / n**0.5
    params = {
      "mlp/~/linear_0": {"w": draw(keys[0], x.shape[1], 8), "b": jnp.zeros(8)},
      "mlp/~/linear_1": {"w": draw(keys[1], 8, 1), "b": jnp.zeros(1)},
    }
    state = {
      "mlp/~/calls": {"count": jnp.zeros([], jnp.int32)},
      "mlp/~/ema": {"hidden": jnp.zeros(8)},
    }
    return params, state

  def apply(params, state, rng, x):
    first, second = params["mlp/~/linear_0"], params["mlp/~/linear_1"]
    hidden = jnp.tanh(x @ first["w"] + first["b"])
    old = state["mlp/~/ema"]["hidden"]
    average = 0.9 * old + 0.1 * hidden.mean(axis=0)
    state = {
      "mlp/~/calls": {"count": state["mlp/~/calls"]["count"] + 1},
      "mlp/~/ema": {"hidden": jax.lax.stop_gradient(average)},
    }
    hidden = hidden * jax.random.bernoulli(rng, 0.8, hidden.shape) / 0.8
    return (hidden @ second["w"] + second["b"])[:, 0], state

  return Transformed(init, apply)


NETWORK = make_transformed()


def transformed_loss(params, state, rng, batch):
  outputs, state = NETWORK.apply(params, state, rng, batch[0])
  return jnp.mean((outputs - batch[1]) ** 2), state


class TrainingState(NamedTuple):
  params: dict
  state: dict
  opt_state: optax.OptState
  rng: jax.Array


def transformed_update(tx, training, batch, *, unscaled_inside=True):
  rng, key = jax.random.split(training.rng)

  def scaled_loss(params):
    loss, state = transformed_loss(params, training.state, key, batch)
    return LOSS_SCALE * loss, state

  unscale = lambda grads: jax.tree.map(lambda g: g / LOSS_SCALE, grads)

  def grad_fn(params):
    grads, _ = jax.grad(scaled_loss, has_aux=True)(params)
    return unscale(grads) if unscaled_inside else grads

  grads, state = jax.grad(scaled_loss, has_aux=True)(training.params)
  updates, opt_state = tx.update(
    unscale(grads), training.opt_state, training.params, grad_fn=grad_fn
  )
  params = optax.apply_updates(training.params, updates)
  return TrainingState(params, state, opt_state, rng)


def transformed_start(tx, batch):
  params, state = NETWORK.init(jax.random.key(0), batch[0])
  return TrainingState(params, state, tx.init(params), jax.random.key(1))


def test_a_transformed_function_with_a_static_loss_scale(batches):
  """Haiku's kind, `apply(params, state, rng, x)`, with jmp's scale; 5 lines."""
  base = optax.sgd(0.1, momentum=0.9)
  tx = optax.chain(fsam(checked=True), base)
  training = transformed_start(tx, batches[0])
  update = jax.jit(functools.partial(transformed_update, tx))
  by_hand, state = ByHand(training.params, base), training.state
  gradient = jax.jit(jax.grad(lambda *args: transformed_loss(*args)[0]))
  rng = training.rng
  for batch in batches:
    training = update(training, batch)
    rng, key = jax.random.split(rng)
    args = (state, key, batch)
    # The average goes by the weights before the step, and counts no ascent.
    state = transformed_loss(by_hand.params, *args)[1]
    by_hand.step(lambda p, args=args: gradient(p, *args))
  jax.effects_barrier()
  by_hand.assert_followed_by(training.params)
  assert_close(training.state, state)
  assert training.state["mlp/~/calls"]["count"] == STEPS


def test_a_loss_scale_outside_of_the_second_gradient_is_found(batches):
  """The same loop with the unscaling left out where it matters is an error."""
  tx = optax.chain(fsam(checked=True), optax.sgd(0.1))
  training = transformed_start(tx, batches[0])
  with pytest.raises(ValueError, match="must be the gradient, `grad_fn"):
    transformed_update(tx, training, batches[0], unscaled_inside=False)


# Lookahead.


def test_lookahead_with_the_two_passes(adapted, batches):
  """Fast and slow weights by `optax.lookahead`; 3 lines change."""
  period, slow_step_size = 2, 0.5
  tx = optax.lookahead(optax.adam(0.05), period, slow_step_size)
  params = optax.LookaheadParams.init_synced(adapted)
  perturbation = fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA)
  fn = fsam_optax.value_and_grad(adapted_loss, perturbation)
  opt_state, perturbation_state = tx.init(params), perturbation.init(adapted)

  @jax.jit
  def step(params, opt_state, perturbation_state, batch):
    loss, grads, perturbation_state, _ = fn(
      params.fast, perturbation_state, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, perturbation_state, loss

  by_hand, slow = ByHand(adapted, optax.adam(0.05)), adapted
  for count, batch in enumerate(batches, start=1):
    params, opt_state, perturbation_state, loss = step(
      params, opt_state, perturbation_state, batch
    )
    np.testing.assert_allclose(
      loss, adapted_loss(by_hand.params, batch), rtol=1e-5
    )
    by_hand.step(lambda p, batch=batch: adapted_gradient(p, batch))
    if count % period == 0:
      towards = lambda s, f: s + slow_step_size * (f - s)
      slow = by_hand.params = jax.tree.map(towards, slow, by_hand.params)
  by_hand.assert_followed_by(params.fast)
  assert_close(params.slow, slow)

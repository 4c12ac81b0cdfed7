"""Training programs as people publish them, with F-SAM put in: language.

Each is written down in the form that its kind has in public, adopts F-SAM in
the lines that its docstring counts, and must do what the equations do.
"""

from by_hand import LMBDA
from by_hand import RHO
from by_hand import ByHand
from flax import linen as nn
import jax
from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax

pytestmark = pytest.mark.slow

STEPS, PARTS, ROWS, LENGTH, WORDS = 3, 2, 4, 6, 7
PADDING, MASK = 0, WORDS - 1  # Tokens that are no words.


class Transformer(nn.Module):
  """One block, whose embedding gives the logits, too."""

  causal: bool

  @nn.compact
  def __call__(self, tokens):
    embed = nn.Embed(WORDS, 8)
    places = nn.Embed(LENGTH, 8, name="places")
    x = embed(tokens) + places(jnp.arange(tokens.shape[1]))
    mask = nn.make_causal_mask(tokens) if self.causal else None
    # Without the bias of the keys, which the softmax takes out again.
    attention = nn.MultiHeadDotProductAttention(num_heads=1, use_bias=False)
    x = x + attention(nn.LayerNorm(use_bias=False)(x), mask=mask)
    x = x + nn.Dense(8)(nn.tanh(nn.Dense(16)(x)))
    return embed.attend(nn.LayerNorm(use_bias=False)(x))


def token_losses(network, params, tokens, targets):
  logits = network.apply(params, tokens)
  return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


@pytest.fixture(scope="module")
def texts():
  """Micro-batches of rows that end in padding, unequal in their tokens."""
  rng = np.random.default_rng(0)
  text = rng.integers(1, MASK, size=(STEPS * PARTS, ROWS, LENGTH))
  ends = rng.integers(2, LENGTH + 1, size=(STEPS * PARTS, ROWS, 1))
  text = jnp.asarray(np.where(np.arange(LENGTH) < ends, text, PADDING))
  assert len(set(np.sum(text != PADDING, axis=(1, 2)).tolist())) > 1
  return text


@pytest.fixture(scope="module")
def params(texts):
  """Of either network, drawn at once: its own `init` takes long to compile."""
  init = Transformer(causal=True).init
  shapes = jax.eval_shape(init, jax.random.key(0), texts[0])
  draw = np.random.default_rng(1).normal
  return jax.tree.map(
    lambda x: jnp.asarray(0.4 * draw(size=x.shape), x.dtype), shapes
  )


DECODER = Transformer(causal=True)


def decoder_loss(params, text):
  """The mean over the tokens of these rows, and their number."""
  inputs = jnp.pad(text[:, :-1], ((0, 0), (1, 0)))
  weights = (text != PADDING).astype(jnp.float32)
  losses = token_losses(DECODER, params, inputs, text)
  tokens = weights.sum()
  return jnp.sum(losses * weights) / tokens, {"tokens": tokens}


# With the loss of the whole batch and its number of tokens.
decoder_value = jax.jit(jax.value_and_grad(decoder_loss, has_aux=True))


def decoder_optimizer():
  schedule = optax.warmup_cosine_decay_schedule(0.01, 0.02, 1, STEPS)
  return optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(schedule, eps=1e-5)
  )


def test_a_decoder_fed_micro_batch_by_micro_batch(texts, params):
  """NanoDO's kind, `MultiSteps` around adamw: 2 lines; each part ascends."""
  base = optax.MultiSteps(decoder_optimizer(), every_k_schedule=PARTS)
  tx = optax.chain(
    fsam_optax.fsam(rho=RHO, lmbda=LMBDA), base.gradient_transformation()
  )

  @jax.jit
  def train_step(params, opt_state, text):
    grad_fn = jax.grad(lambda p: decoder_loss(p, text)[0])
    grads = grad_fn(params)
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    return optax.apply_updates(params, updates), opt_state

  opt_state, by_hand = tx.init(params), ByHand(params, base)
  for text in texts:
    params, opt_state = train_step(params, opt_state, text)
    by_hand.step(lambda p, text=text: decoder_value(p, text)[1])
  by_hand.assert_followed_by(params)
  assert opt_state[1].gradient_step == STEPS


def interleaved(parts):
  """One batch of which row i goes to micro-batch i modulo their number."""
  return jax.tree.map(
    lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts
  )


def test_a_decoder_fed_stacked_micro_batches(texts, params):
  """The same on whole batches: every token counts alike; 3 lines change."""
  tx = decoder_optimizer()
  perturbation = fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA)
  fn = fsam_optax.value_and_grad(
    decoder_loss,
    perturbation,
    has_aux=True,
    num_microbatches=PARTS,
    weight="tokens",
  )

  @jax.jit
  def train_step(params, opt_state, perturbation_state, text):
    (loss, aux), grads, perturbation_state, _ = fn(
      params, perturbation_state, text
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, perturbation_state, loss, aux

  opt_state, perturbation_state = tx.init(params), perturbation.init(params)
  by_hand = ByHand(params, tx)
  for parts in texts.reshape(STEPS, PARTS, ROWS, LENGTH):
    params, opt_state, perturbation_state, loss, aux = train_step(
      params, opt_state, perturbation_state, interleaved(parts)
    )
    # In the other order of rows, which must not matter.
    whole = parts.reshape(-1, LENGTH)
    (expected, numbers), _ = decoder_value(by_hand.params, whole)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert aux["tokens"] == numbers["tokens"]
    by_hand.step(lambda p, whole=whole: decoder_value(p, whole)[1])
  by_hand.assert_followed_by(params)


# A masked language model.

ENCODER = Transformer(causal=False)


def masked_loss(params, model_state, batch, rng):
  """The mean over the masked places alone, and how many those are."""
  del rng
  losses = token_losses(ENCODER, params, batch["tokens"], batch["targets"])
  weights = batch["is_masked"].astype(jnp.float32)
  masked = weights.sum()
  loss = jnp.sum(losses * weights) / masked
  return loss, (model_state, {"masked": masked})


def test_a_masked_language_model_in_micro_batches(texts, params):
  """BERT's kind: one micro-batch has nothing masked; 2 lines change."""
  rng = np.random.default_rng(1)
  targets = texts.reshape(STEPS, PARTS, ROWS, LENGTH)
  chosen = (targets != PADDING) & (rng.random(targets.shape) < 0.3)
  chosen = chosen.at[1, 1].set(False)
  tokens = jnp.where(chosen, MASK, targets)
  data = {"tokens": tokens, "targets": targets, "is_masked": chosen}
  counts = np.sum(chosen, axis=(2, 3))
  assert counts[1, 1] == 0
  assert counts[0, 0] != counts[0, 1]

  tx = optax.adamw(0.02, eps=1e-5)
  state = fsam_optax.TrainState.create(
    apply_fn=ENCODER.apply,
    params=jax.tree.map(jnp.copy, params),
    tx=tx,
    perturbation=fsam_optax.friendly_perturbation(rho=RHO, lmbda=LMBDA),
  )
  step = fsam_optax.make_train_step(
    masked_loss, num_microbatches=PARTS, weight="masked"
  )
  value_and_grad = jax.jit(
    jax.value_and_grad(lambda p, batch: masked_loss(p, None, batch, None)[0])
  )
  by_hand = ByHand(params, tx)
  for t in range(STEPS):
    parts = jax.tree.map(lambda x, t=t: x[t], data)
    whole = jax.tree.map(lambda x: x.reshape(-1, LENGTH), parts)
    state, metrics = step(state, interleaved(parts))
    np.testing.assert_allclose(
      metrics["loss"], value_and_grad(by_hand.params, whole)[0], rtol=1e-5
    )
    assert metrics["masked"] == counts[t].sum()
    assert metrics["skipped"] == 0
    by_hand.step(lambda p, whole=whole: value_and_grad(p, whole)[1])
  by_hand.assert_followed_by(state.params)

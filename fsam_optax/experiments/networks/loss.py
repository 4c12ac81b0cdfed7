"""The loss that is trained on: cross entropy, of labels perhaps smoothed."""

from typing import Any, Callable

from flax import linen as nn
import jax
from jax import numpy as jnp
import optax


def loss_of(
  network: nn.Module, classes: int, label_smoothing: float
) -> Callable[..., Any]:
  """The loss of a network, as :func:`fsam_optax.make_train_step` takes it.

  It reports the ``accuracy`` on the batch, in percent.
  """

  def loss_fn(params, model_state, batch, rng):
    logits, model_state = network.apply(
      {"params": params, **model_state},
      batch["image"],
      train=True,
      mutable=["batch_stats"],
      rngs={"dropout": rng},
    )
    labels = batch["label"]
    if label_smoothing:
      one_hot = jax.nn.one_hot(labels, classes, dtype=logits.dtype)
      losses = optax.softmax_cross_entropy(
        logits, optax.smooth_labels(one_hot, label_smoothing)
      )
    else:
      losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hits = jnp.argmax(logits, axis=-1) == labels
    accuracy = 100 * jnp.mean(hits, dtype=losses.dtype)
    return losses.mean(), (dict(model_state), {"accuracy": accuracy})

  return loss_fn

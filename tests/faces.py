"""The five faces of F-SAM as one: each trains a loss of parameters and a batch.

A face is a function of the loss, the parameters, the base optimizer and the
perturbation. It returns a carry, ``(params, perturbation_state, rest)``, and a
step from a carry and a batch to a carry and :class:`Seen`, for `jax.lax.scan`.
"""

from typing import Any, NamedTuple

from flax import nnx
import jax
from jax import numpy as jnp
import optax
from versions import as_pure

import fsam_optax


class Seen(NamedTuple):
  """The loss of both passes; None where the face does not tell."""

  loss: jax.Array
  perturbed_loss: jax.Array | None


def chain(loss_fn, params, tx, perturbation, **options):
  link = fsam_optax.sharpness_aware(perturbation, **options)

  def step(carry, batch):
    params, state, opt_state = carry
    losses = []

    def grad_fn(params):
      loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      losses.append(loss)
      return grads

    both = optax.chain(link, tx)
    states = state, opt_state
    updates, (state, opt_state) = both.update(
      grad_fn(params), states, params, grad_fn=grad_fn, optimizer_state=states
    )
    params = optax.apply_updates(params, updates)
    return (params, state, opt_state), Seen(losses[0], losses[-1])

  return (params, link.init(params), tx.init(params)), step


def value_and_grad(loss_fn, params, tx, perturbation, **options):
  fn = fsam_optax.value_and_grad(loss_fn, perturbation, **options)

  def step(carry, batch):
    params, state, opt_state = carry
    loss, grads, state, info = fn(
      params, state, batch, optimizer_state=opt_state
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, state, opt_state), Seen(loss, info.perturbed_value)

  return (params, perturbation.init(params), tx.init(params)), step


def state_of(params, perturbation, tx=None, **fields):
  """A train state with a copy of the parameters, as its step deletes them."""
  return fsam_optax.TrainState.create(
    apply_fn=None,
    params=jax.tree.map(jnp.copy, params),
    tx=optax.sgd(0.1) if tx is None else tx,
    perturbation=perturbation,
    **fields,
  )


def step_of(loss_fn, has_aux=False, **options):
  """The train step of a loss without model state or key; the aux is metrics."""

  def with_state(params, model_state, batch, rng):
    output = loss_fn(params, batch)
    loss, metrics = output if has_aux else (output, {})
    return loss, (model_state, metrics)

  return fsam_optax.make_train_step(with_state, **options)


def train_step(loss_fn, params, tx, perturbation, **options):
  pure = step_of(loss_fn, jit=False, **options)
  carry_of = lambda state: (state.params, state.perturbation_state, state)

  def step(carry, batch):
    state, metrics = pure(carry[2], batch)
    return carry_of(state), Seen(metrics["loss"], metrics["perturbed_loss"])

  return carry_of(state_of(params, perturbation, tx)), step


class Weights(nnx.Module):
  """A dict of arrays as a model."""

  def __init__(self, params: dict[str, Any]):
    self.weights = nnx.data(jax.tree.map(nnx.Param, params))


def weights_of(model):
  is_variable = lambda x: isinstance(x, nnx.Variable)
  return jax.tree.map(lambda x: x[...], model.weights, is_leaf=is_variable)


def _nnx_loop(model, optimizer, pass_and_update, state_of_ascent):
  graphdef = nnx.graphdef((model, optimizer))

  def carry_of(model, optimizer):
    is_state = lambda x: isinstance(x, nnx.State)
    ascent = jax.tree.map(
      lambda x: nnx.to_pure_dict(x)["weights"] if is_state(x) else x,
      as_pure(state_of_ascent(optimizer)),
      is_leaf=is_state,
    )
    return weights_of(model), ascent, nnx.state((model, optimizer))

  def step(carry, batch):
    model, optimizer = nnx.merge(graphdef, carry[2])
    seen = pass_and_update(model, optimizer, batch)
    return carry_of(model, optimizer), seen

  return carry_of(model, optimizer), step


def nnx_optimizer(loss_fn, params, tx, perturbation, **options):
  model = Weights(params)
  optimizer = fsam_optax.nnx.Optimizer(
    model, tx, wrt=nnx.Param, perturbation=perturbation
  )

  def pass_and_update(model, optimizer, batch):
    loss, grads, info = optimizer.value_and_grad(
      lambda model, batch: loss_fn(weights_of(model), batch),
      return_info=True,
      **options,
    )(model, batch)
    optimizer.update(model, grads)
    return Seen(loss, info.perturbed_value)

  return _nnx_loop(
    model, optimizer, pass_and_update, lambda o: o.perturbation_state
  )


def nnx_chain(loss_fn, params, tx, perturbation, **options):
  model = Weights(params)
  link = fsam_optax.sharpness_aware(perturbation, **options)
  optimizer = nnx.Optimizer(model, optax.chain(link, tx), wrt=nnx.Param)

  def pass_and_update(model, optimizer, batch):
    fn = fsam_optax.nnx.value_and_grad(lambda m, b: loss_fn(weights_of(m), b))
    loss, grads, grad_fn = fn(model, batch)
    optimizer.update(model, grads, grad_fn=grad_fn)
    return Seen(loss, None)

  return _nnx_loop(model, optimizer, pass_and_update, lambda o: o.opt_state[0])


FACES = {
  face.__name__: face
  for face in (chain, value_and_grad, train_step, nnx_optimizer, nnx_chain)
}


def train(face, loss_fn, params, batches, tx, perturbation, **options):
  """The carry after all batches and what each step saw, by one program."""
  carry, step = face(loss_fn, params, tx, perturbation, **options)
  run = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches))
  return run(carry, batches)

"""The train steps whose cost is counted and timed, each over the same SGD."""

import functools
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax import numpy as jnp
import optax
import optax.tree
import workloads

import fsam_optax

RHO, LMBDA = 0.05, 0.9
LEARNING_RATE, MOMENTUM = 0.01, 0.9
BASE = optax.sgd(LEARNING_RATE, momentum=MOMENTUM)


class Step(NamedTuple):
  """A step to measure.

  Attributes:
    init: ``init(params, model_state)`` returns the first state.
    update: ``update(state, batch)`` returns the next state and what the step
      reports.
  """

  init: Callable[[Any, Any], Any]
  update: Callable[[Any, Any], tuple[Any, Any]]


class Trained(NamedTuple):
  """What every optimizer keeps: the parameters, its own state, the model's."""

  params: Any
  opt_state: Any
  model_state: Any


def steps(loss_fn: workloads.Loss) -> dict[str, Step]:
  """All steps by name, from the least that there is to do upwards."""
  return {
    **by_hand(loss_fn),
    **by_optax(loss_fn),
    **by_train_step(loss_fn),
  }


def by_hand(loss_fn: workloads.Loss) -> dict[str, Step]:
  """Steps written without the package, from SGD to all that the package does.

  The floor is two dependent gradients and one update, without a norm or an
  average. No sharpness-aware step can cost less.
  """
  guarded_ascent = functools.partial(_ascent, is_guarded=True)
  return {
    "SGD": _link(loss_fn, BASE),
    "floor": _two_passes(loss_fn, _fixed_ascent),
    "SAM by hand": _two_passes(loss_fn, _ascent),
    "F-SAM by hand": _two_passes(loss_fn, _ascent, has_ema=True),
    "F-SAM by hand, 4 micro-batches": _two_passes(
      loss_fn, guarded_ascent, has_ema=True, parts=4
    ),
    "F-SAM by hand, 4 local": _local(loss_fn, parts=4),
  }


def _two_passes(loss_fn, ascend, *, has_ema=False, parts=1):
  """A step whose ``ascend(params, grads, ema)`` returns what the second needs.

  These are the perturbed weights, the next average, and whether the gradient is
  finite: a bool array for a step that skips where it is not, or None.
  """
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

  def init(params, model_state):
    ema = optax.tree.zeros_like(params) if has_ema else None
    return Trained(params, BASE.init(params), model_state), ema

  def update(state, batch):
    trained, ema = state
    gradient_at = lambda params: _mean_over(
      parts,
      batch,
      lambda part: value_and_grad(params, trained.model_state, part),
    )
    (loss, model_state), grads = gradient_at(trained.params)
    perturbed, ema, is_finite = ascend(trained.params, grads, ema)
    (perturbed_loss, _), grads = gradient_at(perturbed)
    trained = _descend_where(is_finite, trained, model_state, grads)
    return (trained, ema), (loss, perturbed_loss)

  return Step(init, update)


def _local(loss_fn, parts):
  """Each part takes both passes, along a perturbation of its own."""
  value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
  init = _two_passes(loss_fn, _ascent, has_ema=True).init

  def update(state, batch):
    trained, ema = state

    def both(part):
      (loss, model_state), grads = value_and_grad(
        trained.params, trained.model_state, part
      )
      perturbed, *_ = _ascent(trained.params, grads, ema)
      (perturbed_loss, _), second = value_and_grad(
        perturbed, trained.model_state, part
      )
      return (loss, perturbed_loss, model_state), grads, second

    (*losses, model_state), grads, second = _mean_over(parts, batch, both)
    _, new_ema, _ = _ascent(trained.params, grads, ema)
    is_finite = jnp.isfinite(losses[0])
    trained = _descend_where(is_finite, trained, model_state, second)
    return (trained, new_ema), losses

  return Step(init, update)


def _mean_over(parts, batch, fn):
  """The mean of what `fn` returns for so many parts of the batch."""
  if parts == 1:
    return fn(batch)
  split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
  shapes = jax.eval_shape(fn, jax.tree.map(lambda x: x[0], split))
  total, _ = jax.lax.scan(
    lambda total, part: (optax.tree.add(total, fn(part)), None),
    optax.tree.zeros_like(shapes),
    split,
  )
  return optax.tree.scale(1 / parts, total)


def _descend_where(is_finite, trained, model_state, grads):
  """The update, skipped where `is_finite` is False, as by the train step."""

  def update():
    updates, opt_state = BASE.update(grads, trained.opt_state, trained.params)
    params = optax.apply_updates(trained.params, updates)
    return Trained(params, opt_state, model_state)

  if is_finite is None:
    return update()
  is_finite &= jnp.isfinite(optax.tree.norm(grads))
  branch = lambda: jax.lax.cond(is_finite, update, lambda: trained)
  select = lambda: optax.tree.where(is_finite, update(), trained)
  return jax.lax.platform_dependent(cpu=branch, tpu=branch, default=select)


def _fixed_ascent(params, grads, ema):
  return optax.tree.add_scale(params, RHO, grads), ema, None


def _ascent(params, grads, ema, *, is_guarded=False):
  """Along the gradient, less the average where there is one."""
  direction = grads if ema is None else optax.tree.sub(grads, ema)
  norm = optax.tree.norm(direction)
  scale, is_finite = RHO / (norm + 1e-12), None
  new_ema = None
  if ema is not None:
    new_ema = optax.tree.add_scale(ema, 1 - LMBDA, direction)
  if is_guarded:
    is_finite = jnp.isfinite(norm)
    scale = jnp.where(is_finite, scale, 0.0)
    new_ema = optax.tree.where(is_finite, new_ema, ema)
  return optax.tree.add_scale(params, scale, direction), new_ema, is_finite


def by_optax(loss_fn: workloads.Loss) -> dict[str, Step]:
  """Transformations of optax that take the second gradient themselves."""
  ascent = lambda: optax.chain(optax.contrib.normalize(), optax.sgd(RHO))
  opaque = optax.contrib.sam(BASE, ascent(), opaque_mode=True)
  transparent = optax.contrib.sam(BASE, ascent(), sync_period=2)
  return {
    "optax.contrib.sam": _link(loss_fn, opaque),
    # One call for each of the two gradients.
    "optax.contrib.sam, transparent": _link(loss_fn, transparent, calls=2),
    "fsam in a chain": _link(
      loss_fn, optax.chain(fsam_optax.fsam(RHO, lmbda=LMBDA), BASE)
    ),
  }


def _link(loss_fn, tx, *, calls=1):
  tx = optax.with_extra_args_support(tx)

  def once(trained, batch):
    params, opt_state, model_state = trained
    gradient = lambda at: jax.value_and_grad(loss_fn, has_aux=True)(
      at, model_state, batch
    )
    (loss, new_model_state), grads = gradient(params)
    # optax.contrib.sam hands it a step number besides.
    grad_fn = lambda at, *_: gradient(at)[1]
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=grad_fn)
    params = optax.apply_updates(params, updates)
    return Trained(params, opt_state, new_model_state), loss

  def update(trained, batch):
    for _ in range(calls):
      trained, loss = once(trained, batch)
    return trained, loss

  init = lambda params, model_state: Trained(
    params, tx.init(params), model_state
  )
  return Step(init, update)


def by_train_step(loss_fn: workloads.Loss) -> dict[str, Step]:
  """The train step, option by option."""
  friendly = lambda **options: fsam_optax.friendly_perturbation(
    RHO, lmbda=LMBDA, **options
  )

  def step(perturbation=None, **options):
    return train_step(loss_fn, perturbation or friendly(), **options)

  found = {
    "no skip": step(skip_nonfinite=False),
    "all metrics": step(
      metrics=("gradient_norm", "direction_norm", "gradient_ema_cosine")
    ),
    "SAM": step(fsam_optax.sam_perturbation(RHO)),
    "average of the descent": step(ema_gradient="descent"),
    "momentum as the average": step(friendly(average="optimizer")),
    "paper order": step(friendly(order="paper")),
    "adaptive": step(friendly(adaptive=True)),
    "bfloat16 average": step(friendly(accumulator_dtype=jnp.bfloat16)),
    "1/8": step(ascent_fraction=1 / 8),
    "1/8, average of the descent": step(
      ascent_fraction=1 / 8, ema_gradient="descent"
    ),
    "4 micro-batches": step(num_microbatches=4),
    "4 local": step(num_microbatches=4, sync_perturbation=False),
    # Gates.
    "every 2nd": step(every=2),
    "gate shut": step(stop=0),
  }
  return {
    "train step (default)": step(),
    **{f"train step, {name}": step for name, step in found.items()},
  }


def train_step(
  loss_fn: workloads.Loss,
  perturbation: Optional[optax.GradientTransformation],
  **options: Any,
) -> Step:
  """What :func:`fsam_optax.make_train_step` makes, over SGD."""

  def init(params, model_state):
    return fsam_optax.TrainState.create(
      apply_fn=None,
      params=params,
      tx=BASE,
      perturbation=perturbation,
      model_state=model_state,
    )

  def loss_of_step(params, model_state, batch, rng):
    del rng
    loss, model_state = loss_fn(params, model_state, batch)
    return loss, (model_state, {})

  update = fsam_optax.make_train_step(loss_of_step, jit=False, **options)
  return Step(init, update)

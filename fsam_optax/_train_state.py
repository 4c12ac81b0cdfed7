"""The train state of a Flax loop."""

from collections.abc import Mapping
from typing import Any, Optional

from flax import struct
from flax.training import dynamic_scale as dynamic_scale_lib
from flax.training import train_state
import jax
from jax import numpy as jnp
import optax

from fsam_optax._optimizer_average import check_optimizer_average
from fsam_optax._perturbation import OVERWRITTEN
from fsam_optax._perturbation import check_perturbation
from fsam_optax._trees import PyTree


class TrainState(train_state.TrainState, kw_only=True):
  """Flax's train state, with the fields that the two passes need.

  Attributes:
    perturbation: transformation from gradients to perturbations (static);
      None trains with the base optimizer alone, one gradient a step.
    perturbation_state: its state.
    model_state: variables of the model that are not parameters, such as
      BatchNorm's statistics; any pytree or None.
    rng: key from which the dropout key of each step is folded, or None.
    dynamic_scale: Flax's loss scale, for float16, or None.
  """

  perturbation: Optional[optax.GradientTransformation] = struct.field(
    pytree_node=False, default=None
  )
  perturbation_state: Any = None
  model_state: Any = None
  rng: Optional[jax.Array] = None
  dynamic_scale: Optional[dynamic_scale_lib.DynamicScale] = None

  @classmethod
  def create(
    cls,
    *,
    apply_fn,
    params,
    tx,
    perturbation,
    model_state=None,
    rng=None,
    dynamic_scale=None,
    **kwargs,
  ):
    """Creates a state at step 0 with fresh optimizer and perturbation states.

    Args:
      apply_fn: usually ``model.apply``, kept for convenience.
      params: the parameters, a dict or another container of arrays, or one
        array.
      tx: the base optimizer, without :func:`fsam` in its chain, because the
        train step takes the second gradient itself.
      perturbation: such as :func:`friendly_perturbation`, or None.
      model_state: any pytree, or None.
      rng: a key, or None.
      dynamic_scale: a :class:`flax.training.dynamic_scale.DynamicScale`, or
        None; see :func:`make_train_step`.
      **kwargs: fields that a subclass adds.

    Returns:
      The state, with ``step`` an int32 array of shape ``[]``.

    Raises:
      TypeError: if ``perturbation`` is not a gradient transformation, or needs
        ``grad_fn``, or ``dynamic_scale`` is not Flax's.
      ValueError: if it has ``average="optimizer"``, and the momentum of ``tx``
        is missing, ambiguous, of scaled gradients or of another decay.
    """
    state = cls(
      step=jnp.zeros([], jnp.int32),
      apply_fn=apply_fn,
      params=params,
      tx=tx,
      opt_state=tx.init(_trained(params)),
      model_state=model_state,
      # A copy: the train step donates the state, and the key is the caller's.
      rng=None if rng is None else jnp.copy(rng),
      dynamic_scale=_as_arrays(dynamic_scale),
      **kwargs,
    )
    if perturbation is not None:
      check_perturbation(perturbation)
      check_optimizer_average(perturbation, tx, params)
      state = state.replace(
        perturbation=perturbation,
        perturbation_state=perturbation.init(params),
      )
    return without_aliases(state)

  def apply_gradients(self, *, grads, grad_fn=None, extra_args=None, **kwargs):
    """One update of the parameters by given gradients.

    A loop without :func:`make_train_step` takes the gradients by
    :func:`value_and_grad`, which also returns the perturbation's state::

      fn = fsam_optax.value_and_grad(loss_fn, state.perturbation)
      loss, grads, perturbation_state, info = fn(
        state.params, state.perturbation_state, batch
      )
      state = state.apply_gradients(
        grads=grads, perturbation_state=perturbation_state
      )

    Args:
      grads: tree, shapes and dtypes of the parameters.
      grad_fn: for a ``tx`` with :func:`fsam` in its chain, in a state without a
        perturbation.
      extra_args: further keyword arguments of the update of ``tx``, such as
        ``value``.
      **kwargs: fields to replace, with ``perturbation_state`` among them if the
        state has a perturbation.

    Returns:
      The state, one step on.

    Raises:
      ValueError: if the state has a perturbation and ``perturbation_state`` is
        missing, as in a loop that takes its gradient at the clean parameters.
    """
    if self.perturbation is not None and "perturbation_state" not in kwargs:
      raise ValueError(
        "`perturbation_state` must be given where the state has a "
        "perturbation, got gradients alone. Use `make_train_step`, or give "
        "what `fsam_optax.value_and_grad(loss_fn, state.perturbation)` "
        "returns; `create(perturbation=None)` trains without F-SAM."
      )
    extra_args = dict(extra_args or {})
    if grad_fn is not None:
      extra_args["grad_fn"] = grad_fn
    trained = _trained(self.params)
    updates, opt_state = optax.with_extra_args_support(self.tx).update(
      _trained(grads), self.opt_state, trained, **extra_args
    )
    params = optax.apply_updates(trained, updates)
    if trained is not self.params:  # The "gradient" of fp8 is its next value.
      params = type(self.params)(
        {"params": params, OVERWRITTEN: grads[OVERWRITTEN]}
      )
    return self.replace(
      step=self.step + 1, params=params, opt_state=opt_state, **kwargs
    )


def without_aliases(tree: PyTree) -> PyTree:
  """Copies every array that occurs in a tree for a second time.

  Donation needs each buffer once. The state of an optimizer such as
  :func:`optax.contrib.prodigy` holds the first parameters.
  """
  seen = set()

  def copy_again(x):
    if id(x) in seen and isinstance(x, jax.Array):
      return jnp.copy(x)
    seen.add(id(x))
    return x

  return jax.tree.map(copy_again, tree)


def _trained(params: Any) -> Any:
  """Without Flax's collection for fp8, which no optimizer moves."""
  is_fp8 = isinstance(params, Mapping) and OVERWRITTEN in params
  return params["params"] if is_fp8 else params


def _as_arrays(scale):
  """The loss scale with arrays for Python numbers, as a step returns it."""
  if scale is None:
    return None
  if not isinstance(scale, dynamic_scale_lib.DynamicScale):
    raise TypeError(
      "`dynamic_scale` must be a flax.training.dynamic_scale.DynamicScale, or "
      f"None, got {scale!r}. Write `dynamic_scale=DynamicScale()`."
    )
  return scale.replace(
    fin_steps=jnp.asarray(scale.fin_steps, jnp.int32),
    scale=jnp.asarray(scale.scale, jnp.float32),
  )

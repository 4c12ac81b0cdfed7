"""Checks of the user's loss function and of what it returns."""

from collections.abc import Mapping
import inspect
from typing import Any, Callable

import jax
from jax import numpy as jnp

from fsam_optax._fsam import difference
from fsam_optax._fsam import dtype_of
from fsam_optax._fsam import leaves_by_names
from fsam_optax._fsam import shape_and_dtype
from fsam_optax._perturbation import widen
from fsam_optax._trees import PyTree
from fsam_optax._trees import leaves_by_path


def check_loss_fn(loss_fn: Any, arguments: tuple[str, ...] = ()) -> None:
  """Raises unless `loss_fn` is callable, and takes arguments of these names."""
  if not callable(loss_fn):
    raise TypeError(
      "`loss_fn` must be callable, a function that returns the loss, got "
      f"{loss_fn!r}."
    )
  if not arguments:
    return
  try:
    signature = inspect.signature(loss_fn)
  except (TypeError, ValueError):  # Not every callable has one.
    return
  try:
    signature.bind(*arguments)
  except TypeError as error:
    raise TypeError(
      f"`loss_fn` must take the arguments ({', '.join(arguments)}), got "
      f"one of {signature}."
    ) from error


def loss_and_aux(output: Any, has_aux: bool) -> tuple[Any, Any]:
  """The loss and the aux of an output; the aux is None without `has_aux`."""
  if not has_aux:
    return output, None
  if not (isinstance(output, tuple) and len(output) == 2):
    got = f"{len(output)} values" if isinstance(output, tuple) else "one value"
    raise TypeError(
      "`loss_fn` must return a pair (loss, aux) when `has_aux=True`, got "
      f"{got}."
    )
  return output


def check_loss(loss: Any) -> None:
  """Raises unless the loss is a real scalar."""
  dtype = dtype_of(loss)
  is_real = dtype is not None and jnp.issubdtype(dtype, jnp.floating)
  if not is_real or jnp.shape(loss):
    raise TypeError(
      "`loss_fn` must return the loss as a real scalar, got "
      f"{shape_and_dtype(loss)}. Take the mean over the batch. Other "
      "outputs are aux, with `has_aux=True` where a function has that option."
    )


def check_averaged(aux: PyTree) -> None:
  """Raises unless the auxiliary outputs have means: floating scalars."""
  for path, x in leaves_by_path(aux):
    dtype, shape = jnp.result_type(x), jnp.shape(x)
    if shape or not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        "`loss_fn` must return auxiliary outputs that are floating scalars, "
        "because they are averaged over the micro-batches of "
        "`num_microbatches` and over the replicas of a train step with "
        f"`axis_name`, got {dtype}{list(shape)} at {path}. Reduce it over the "
        "rows and cast it to float32; compute outputs for each row in another "
        "pass."
      )


def weight_of(aux: PyTree, name: str) -> jax.Array:
  """The weight of a part of the batch, from the aux, in float32 at least.

  No gradient flows through it.
  """
  weight = aux.get(name) if isinstance(aux, Mapping) else None
  if weight is None or jnp.shape(weight) or jnp.iscomplexobj(weight):
    raise TypeError(
      f"`loss_fn` must return the weight {name!r} of its rows, a real scalar, "
      "in a dict of auxiliary outputs (value_and_grad with `has_aux=True`) or "
      f"of metrics (make_train_step), got {shape_and_dtype(weight)}."
    )
  return widen(jax.lax.stop_gradient(jnp.asarray(weight)))


def check_same_aux(fewer: Callable[[], Any], whole: Callable[[], Any]) -> None:
  """Raises if shapes in the first pass depend on the number of rows.

  Both functions return ``((loss, aux, ...), carry)``.
  """
  few, all_rows = map(jax.eval_shape, (fewer, whole))
  for i, what in enumerate(("return auxiliary outputs", "leave a model")):
    pick = lambda output, i=i: (output[0][1], output[1])[i]
    if differing := difference(pick(few), pick(all_rows)):
      raise ValueError(
        f"`loss_fn` must {what} whose shapes do not depend on the number of "
        "rows when `ascent_fraction` is below 1 and `every`, `start` or `stop` "
        f"is set, got {differing} on all rows. Reduce them over the rows."
      )


_OTHER_MODEL_STATE = (
  '`TrainState.create` gets it by collection, `model_state={"batch_stats": '
  'variables["batch_stats"]}`, and the loss returns it before the metrics.'
)
NO_MODEL_STATE = (
  "`model_state` of the train state is None. If the model has variables that "
  "are not parameters, such as BatchNorm's statistics, give them: "
  '`TrainState.create(..., model_state={"batch_stats": '
  'variables["batch_stats"]})`.'
)


def step_output(output: Any, model_state: Any) -> PyTree:
  """The output ``(loss, (model_state, metrics))`` of the loss of a train step.

  The model state comes in the containers of the given one, because a loss may
  return a dict for a FrozenDict.
  """
  is_pair = lambda x: isinstance(x, tuple) and len(x) == 2
  if not (
    is_pair(output) and is_pair(output[1]) and isinstance(output[1][1], dict)
  ):
    raise TypeError(
      "`loss_fn` must return (loss, (model_state, metrics)) with a dict of "
      "metrics, which may be empty. If the model has no state, return the "
      "`model_state` that the loss got."
    )
  loss, (returned, metrics) = output
  if differing := difference(model_state, returned):
    remedy = NO_MODEL_STATE if model_state is None else _OTHER_MODEL_STATE
    raise ValueError(
      "`loss_fn` must return the model state in the structure, shapes and "
      f"dtypes of the one it was given, with {differing}. {remedy}"
    )
  by_names = leaves_by_names(returned)
  ordered = [by_names[names] for names in leaves_by_names(model_state)]
  as_given = jax.tree.unflatten(jax.tree.structure(model_state), ordered)
  return loss, (as_given, metrics)

"""The loss: what a user's function must be and return."""

from typing import Any, Callable

import jax
from jax import numpy as jnp

from fsam_optax._tree_paths import leaves_by_path


def check_loss_fn(loss_fn: Any) -> None:
  """Raises unless `loss_fn` is callable."""
  if not callable(loss_fn):
    raise TypeError(
      "`loss_fn` must be callable, a function that returns the loss, got "
      f"{loss_fn!r}."
    )


def loss_and_aux(output: Any, has_aux: bool) -> tuple[Any, Any]:
  """Splits what `loss_fn` returned; the aux is None without `has_aux`."""
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
  if hasattr(loss, "dtype") or isinstance(loss, (int, float, complex)):
    dtype, shape = jnp.result_type(loss), jnp.shape(loss)
    if not shape and jnp.issubdtype(dtype, jnp.floating):
      return
    got = f"{dtype}{list(shape)}"
  else:
    got = type(loss).__name__
  raise TypeError(
    f"`loss_fn` must return the loss as a real scalar, got {got}. Take the "
    "mean over the batch; return other outputs as aux, with `has_aux=True`."
  )


def check_averaged(aux: Any) -> None:
  """Raises unless the auxiliary outputs have means."""
  for path, x in leaves_by_path(aux):
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.inexact):
      raise TypeError(
        "`loss_fn` must return floating auxiliary outputs when "
        "`num_microbatches` is above 1 or `axis_name` is given, because they "
        f"are averaged, got {dtype} at {path}. Cast it to float32."
      )


def check_same_aux(fewer: Callable[[], Any], whole: Callable[[], Any]) -> None:
  """Raises unless the auxiliary outputs are the same for fewer rows.

  Args:
    fewer: the first pass on the ascent's rows, ``((loss, aux, grads), carry)``.
    whole: the same on all rows.

  Raises:
    ValueError: if a shape or dtype depends on the number of rows.
  """
  outputs = [
    jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(fn)[0][1])
    for fn in (fewer, whole)
  ]
  if outputs[0] != outputs[1]:
    raise ValueError(
      "`loss_fn` must return auxiliary outputs whose shapes do not depend on "
      "the number of rows when `ascent_fraction` is below 1 and `every`, "
      f"`start` or `stop` is set, got {outputs[0]} and {outputs[1]}. Reduce "
      "them over the rows."
    )


def check_step_output(output: Any, model_state: Any) -> None:
  """Raises unless the loss of a train step returned what it must.

  Args:
    output: must be ``(loss, (model_state, metrics))``.
    model_state: what the loss was given, whose structure, shapes and dtypes
      those of the new one must be.

  Raises:
    TypeError: if the output is no such tuple.
    ValueError: if the new model state differs in structure, shape or dtype.
  """
  is_pair = lambda x: isinstance(x, tuple) and len(x) == 2
  if not (
    is_pair(output) and is_pair(output[1]) and isinstance(output[1][1], dict)
  ):
    raise TypeError(
      "`loss_fn` must return (loss, (model_state, metrics)) with a dict of "
      "metrics, which may be empty. Return the `model_state` it was given "
      "where the model has none."
    )
  describe = lambda tree: jax.tree.map(
    lambda x: (jnp.shape(x), jnp.result_type(x)), tree
  )
  given, returned = describe(model_state), describe(output[1][0])
  if returned != given:
    raise ValueError(
      "`loss_fn` must return the model state in the structure, shapes and "
      f"dtypes of the one it was given, {given}, got {returned}."
    )

"""Masks for the common wishes: which leaves to perturb.

Each goes into ``mask=`` of :func:`fsam_optax.fsam` and the perturbations.
"""

import re
from typing import Any, Callable

import jax
from jax import numpy as jnp

from fsam_optax._tree_paths import joined_path


def exclude_biases_and_norms(params: Any) -> Any:
  """Selects all but biases and the scales and shifts of norms.

  Those are the arrays of at most one dimension, by the usual convention.

  Examples:
    >>> import jax.numpy as jnp
    >>> from fsam_optax import masks
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> print(masks.exclude_biases_and_norms(params))
    {'bias': False, 'kernel': True}

  Args:
    params: the parameters, any pytree of arrays.

  Returns:
    A tree of bools with the structure of ``params``, for ``mask=``. Pass the
    function itself: ``fsam(mask=masks.exclude_biases_and_norms)``.
  """
  return jax.tree.map(lambda x: jnp.ndim(x) > 1, params)


def by_path(pattern: str) -> Callable[[Any], Any]:
  r"""Selects the leaves whose path matches a regular expression.

  The path of a leaf is the names on the way to it, joined by slashes, such as
  ``Dense_0/kernel``; a match anywhere in it counts, upper case or lower. For
  low-rank adapters: ``masks.by_path("lora")``.

  Examples:
    >>> import jax.numpy as jnp
    >>> from fsam_optax import masks
    >>> params = {"base": jnp.ones(2), "lora_a": jnp.ones(2)}
    >>> print(masks.by_path("lora")(params))
    {'base': False, 'lora_a': True}

  Args:
    pattern: the regular expression, in the syntax of :mod:`re`.

  Returns:
    A callable from parameters to a tree of bools, for ``mask=``.

  Raises:
    ValueError: if the pattern is not a regular expression.

  .. note::
    A mask saves the perturbation and the average of the other leaves, not
    their gradient. To save that of frozen weights too, leave them out of the
    parameters: differentiate with respect to the adapters alone, and keep the
    frozen weights in the model state or a closure.
  """
  try:
    expression = re.compile(pattern, re.IGNORECASE)
  except (re.error, TypeError) as error:
    raise ValueError(
      f"`pattern` must be a regular expression, got {pattern!r}: {error}."
    ) from error

  def mask(params):
    return jax.tree_util.tree_map_with_path(
      lambda path, _: bool(expression.search(joined_path(path))), params
    )

  return mask


def norms_only(params: Any) -> Any:
  """Selects the parameters of normalization layers alone (SAM-ON).

  Those are the leaves with ``norm`` in their path, or a part of it that begins
  with ``bn``, as Flax names them (``BatchNorm_0/scale``).

  Examples:
    >>> import jax.numpy as jnp
    >>> from fsam_optax import masks
    >>> params = {"Dense_0": jnp.ones(2), "LayerNorm_0": jnp.ones(2)}
    >>> print(masks.norms_only(params))
    {'Dense_0': False, 'LayerNorm_0': True}

  Args:
    params: the parameters, any pytree of arrays whose paths name the layers.

  Returns:
    A tree of bools with the structure of ``params``, for ``mask=``.

  References:
    Mueller et al., `Normalization Layers Are All That Sharpness-Aware
    Minimization Needs <https://arxiv.org/abs/2306.04226>`_, 2023
  """
  return by_path(r"norm|(^|/)bn")(params)

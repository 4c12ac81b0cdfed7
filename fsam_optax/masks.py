"""Masks that select the leaves to perturb.

They are for the argument ``mask`` of :func:`fsam_optax.fsam` and of the
perturbations.
"""

import collections
import re
from typing import Any, Callable, NamedTuple

from flax import nnx
from flax.core import meta
import jax
from jax import numpy as jnp

from fsam_optax._trees import PyTree
from fsam_optax._trees import joined_path

# Parts between underscores of a leaf's name: Flax has `bias` and `scale`, Haiku
# `offset`, Equinox `bias_n`, others `ln1_gamma`.
_NO_WEIGHT = frozenset(
  {"bias", "biases", "scale", "scales", "offset", "beta", "gamma"}
)
# No norm has one of these. In Equinox a norm may have a `weight`.
_WEIGHT = frozenset({"kernel", "w", "embedding", "embeddings"})
_NORM = re.compile(r"norm|^(bn|ln)|_(bn|ln)(_|\d|$)", re.IGNORECASE)


def exclude_biases_and_norms(params: PyTree) -> PyTree:
  """Selects all but biases and the scales and shifts of norms.

  The path of a leaf decides, in the names of Flax Linen, NNX, Haiku and
  Equinox. The first of these rules that applies counts:

  1. ``bias``, ``scale``, ``offset``, ``beta`` or ``gamma``, also as a part of a
     name such as ``bias_n`` or ``ln1_scale``: excluded, whatever its shape,
     unless ``kernel``, ``w`` or ``embedding`` is another part. A bias has a
     second axis in a stack of layers by ``nn.scan``, and in Flax's attention.
  2. ``b`` beside a ``w`` of more dimensions, as in Haiku, or ``b1`` beside
     ``w1``: excluded. The ``b`` of a low-rank pair ``a`` and ``b`` is no bias.
  3. A leaf of a norm layer, by the rule of :func:`norms_only`: excluded.
  4. Every other leaf: selected if it has more than one dimension.

  Examples:
    >>> import jax.numpy as jnp
    >>> from fsam_optax import masks
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 2))}
    >>> print(masks.exclude_biases_and_norms(params))
    {'bias': False, 'kernel': True}

  Args:
    params: the parameters, any pytree of arrays.

  Returns:
    A tree of bools with the structure of ``params``, for ``mask=``. Pass the
    function itself: ``fsam(mask=masks.exclude_biases_and_norms)``.
  """

  def is_selected(leaf):
    parts = _parts(leaf.name)
    if parts & _NO_WEIGHT and not parts & _WEIGHT:
      return False
    if _is_bias_of_w(leaf) or _is_of_norm(leaf):
      return False
    return leaf.ndim > 1

  return _map_named(is_selected, params)


def by_path(pattern: str) -> Callable[[Any], Any]:
  r"""Selects the leaves whose path matches a regular expression.

  The path of a leaf is its names joined by slashes, such as ``Dense_0/kernel``.
  A match anywhere in it counts, in upper or lower case. A leaf in a box of Flax
  has the path of the box.

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
  """
  try:
    expression = re.compile(pattern, re.IGNORECASE)
  except (re.error, TypeError) as error:
    raise ValueError(
      f"`pattern` must be a regular expression, got {pattern!r}: {error}."
    ) from error

  def mask(params):
    found = [bool(expression.search(path)) for path, _ in _named_leaves(params)]
    return jax.tree.unflatten(jax.tree.structure(params), found)

  return mask


def norms_only(params: PyTree) -> PyTree:
  """Selects the parameters of normalization layers alone (SAM-ON).

  The layer of a leaf is the nearest name above it that is not a number. It is a
  norm if its name contains ``norm``, has ``_bn`` or ``_ln`` as a part, or
  begins with ``bn`` or ``ln``, as in ``BatchNorm_0/scale``, ``bn1/bias`` or
  ``query_ln/scale``. A leaf may have such a name itself.

  A layer with a ``kernel``, a ``w`` or an ``embedding`` is no norm, whatever
  its name, as in ``prenorm_mlp/kernel``. Nor is a layer whose arrays differ in
  their number of dimensions.

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
  return _map_named(_is_of_norm, params)


class _Leaf(NamedTuple):
  """The names and dimensions that the rules read."""

  name: str
  layer: str  # The nearest name above it, empty where there is none.
  ndim: int
  ndims: dict[str, int]  # Of all leaves of its layer, by name.


def _map_named(fn, params):
  """Maps a function of :class:`_Leaf` over the leaves of a tree."""
  leaves = _named_leaves(params)
  paths = [path.split("/") for path, _ in leaves]
  layers = collections.defaultdict(dict)
  for (*above, name), (_, x) in zip(paths, leaves, strict=True):
    layers[tuple(above)][name] = jnp.ndim(x)
  bools = []
  for *above, name in paths:
    ndims = layers[tuple(above)]
    named = [part for part in above if not part.isdigit()]
    layer = named[-1] if named else ""
    bools.append(bool(fn(_Leaf(name, layer, ndims[name], ndims))))
  return jax.tree.unflatten(jax.tree.structure(params), bools)


def _named_leaves(params):
  """Each leaf with its path, which in a box of Flax is that of the box."""
  is_box = lambda x: isinstance(x, (nnx.Variable, meta.AxisMetadata))
  boxes = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
  # A key of Haiku joins its modules: `mlp/~/linear_0`.
  return [
    (joined_path(path), leaf)
    for path, box in boxes
    for leaf in jax.tree.leaves(box)
  ]


def _parts(name):
  return frozenset(re.split(r"[_\d]+", name.lower()))


def _is_bias_of_w(leaf):
  name, ndims = leaf.name.lower(), {k.lower(): n for k, n in leaf.ndims.items()}
  if not name.startswith("b"):
    return False
  twins = {"w" + name[1:]}
  if name == "b":
    twins |= {other for other in ndims if other.startswith("w_")}
  return any(ndims.get(twin, 0) > leaf.ndim for twin in twins)


def _is_of_norm(leaf):
  if _NORM.search(leaf.name):
    return not _parts(leaf.name) & _WEIGHT
  return bool(
    _NORM.search(leaf.layer)
    and not any(_parts(name) & _WEIGHT for name in leaf.ndims)
    and len(set(leaf.ndims.values())) == 1
  )

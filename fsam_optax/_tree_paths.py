"""The leaves of a tree by name: how a path reads, in errors and in patterns."""

from typing import Any

import jax


def joined_path(path: Any, separator: str = "/") -> str:
  """A path as its names alone, such as ``params/Dense_0/kernel``.

  Args:
    path: what :func:`jax.tree_util.tree_leaves_with_path` gives.
    separator: stands between the names.

  Returns:
    The names, joined.
  """
  return jax.tree_util.keystr(path, simple=True, separator=separator)


def path_in_error(path: Any) -> str:
  """A path as Python spells it, such as ``['params'].kernel``, never empty."""
  return jax.tree_util.keystr(path) or "the root"


def leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
  """Every leaf of a tree beside its path, spelled for an error.

  Args:
    tree: any tree.

  Returns:
    Pairs of path and leaf, in the order of :func:`jax.tree.leaves`.
  """
  return [
    (path_in_error(path), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  ]

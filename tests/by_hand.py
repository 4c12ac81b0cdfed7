"""Both passes by hand, trees as vectors, and how trees are compared."""

import jax
from jax import flatten_util
from jax import numpy as jnp
import numpy as np
import optax


def flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def unflat(vector, like):
  raveled, unravel = flatten_util.ravel_pytree(like)
  return unravel(jnp.asarray(vector, raveled.dtype))


def two_passes(loss_fn, perturbation, state, params, *args, **kwargs):
  """Value and gradient at both points, and the state after the ascent."""
  fn = jax.value_and_grad(loss_fn)
  clean = fn(params, *args, **kwargs)
  epsilon, state = perturbation.update(clean[1], state, params)
  perturbed = fn(optax.apply_updates(params, epsilon), *args, **kwargs)
  return clean, perturbed, state


def assert_close(found, expected, tolerance=1e-5):
  """The default is for weights of order one, in float32, over a few steps."""
  np.testing.assert_allclose(
    flat(found), flat(expected), rtol=0, atol=tolerance
  )


def assert_near(found, expected, tolerance):
  """That trees agree, relative to the largest element of what is expected."""
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  assert_close(found, expected, tolerance * np.abs(flat(expected)).max())


def is_key(x):
  return isinstance(x, jax.Array) and jnp.issubdtype(
    x.dtype, jax.dtypes.prng_key
  )


def bits(tree):
  """Type, shape and bytes of every leaf, by path; of keys those of the data."""

  def leaf_bits(x):
    data = np.asarray(jax.random.key_data(x) if is_key(x) else x)
    return str(data.dtype), data.shape, data.tobytes()

  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf_bits(x) for path, x in leaves}


def assert_same_bits(found, expected):
  found, expected = bits(found), bits(expected)
  assert found.keys() == expected.keys()
  assert [path for path in found if found[path] != expected[path]] == []

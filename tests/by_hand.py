"""F-SAM by hand around any loop: the oracle on one vector of all parameters.

What follows F-SAM, the base optimizer, is optax's own; the ascent is NumPy. And
how trees are compared: to a tolerance, or bit by bit.
"""

import jax
from jax import numpy as jnp
import numpy as np
import optax
from oracle import FriendlySam

RHO, SIGMA, LMBDA = 0.2, 1.0, 0.6
# Of parameters of order one, in float32, over a few steps.
TOLERANCE = 1e-5


def flat(tree):
  return np.concatenate(
    [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
  )


def unflat(vector, like):
  leaves, structure = jax.tree.flatten(like)
  parts = np.split(vector, np.cumsum([x.size for x in leaves])[:-1])
  return jax.tree.unflatten(
    structure,
    [
      jnp.asarray(part.reshape(x.shape), x.dtype)
      for part, x in zip(parts, leaves, strict=True)
    ],
  )


def two_passes(loss_fn, perturbation, state, params, *args, **kwargs):
  """Value and gradient at both points, and the state after the ascent."""
  fn = jax.value_and_grad(loss_fn)
  clean = fn(params, *args, **kwargs)
  epsilon, state = perturbation.update(clean[1], state, params)
  perturbed = fn(optax.apply_updates(params, epsilon), *args, **kwargs)
  return clean, perturbed, state


class ByHand:
  """F-SAM in front of an optimizer of optax, and the optimizer alone.

  Attributes:
    params: what F-SAM trains.
    plain: what the optimizer trains alone, on the same batches: a loop that
      lost its perturbation would end there.
  """

  def __init__(self, params, tx):
    self.params = self.plain = params
    self._state = self._plain_state = tx.init(params)
    self._update = jax.jit(tx.update)
    self._ascent = FriendlySam(RHO, SIGMA, LMBDA)

  def perturbed_gradient(self, gradient_of):
    weights = flat(self.params)
    gradient = flat(gradient_of(self.params))
    perturbation = self._ascent(gradient, weights)
    return gradient_of(unflat(weights + perturbation, self.params))

  def step(self, gradient_of):
    """One step on the gradient of one batch, a function of the parameters."""
    gradient = self.perturbed_gradient(gradient_of)
    updates, self._state = self._update(gradient, self._state, self.params)
    self.params = optax.apply_updates(self.params, updates)
    updates, self._plain_state = self._update(
      gradient_of(self.plain), self._plain_state, self.plain
    )
    self.plain = optax.apply_updates(self.plain, updates)

  def assert_followed_by(self, params, tolerance=TOLERANCE):
    assert_close(params, self.params, tolerance)
    away = np.abs(flat(self.plain) - flat(self.params)).max()
    assert away > 20 * tolerance, f"the plain loop ends only {away} away"


def assert_close(found, expected, tolerance=TOLERANCE):
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

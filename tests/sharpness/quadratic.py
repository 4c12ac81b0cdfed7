"""A quadratic loss over 24 rows, whose Hessian has a known spectrum."""

from jax import numpy as jnp
import numpy as np

SPECTRUM = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.25])


def loss(params, batch):
  """Half the mean square of the rows' products: the Hessian is their Gram."""
  w = jnp.concatenate([params["a"], params["b"]])
  return 0.5 * jnp.mean((batch["x"] @ w) ** 2)


def tree(vector):
  """The vector as a tree of two leaves."""
  return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:])}


def hessian(data):
  """The Hessian of the loss, by NumPy."""
  return data["x"].T @ data["x"] / 24

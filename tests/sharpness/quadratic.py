"""A quadratic loss over 24 rows, whose Hessian has a known spectrum."""

from jax import numpy as jnp
import numpy as np

SPECTRUM = np.array([5.0, 3.0, 2.0, 1.0, 0.5, 0.25])
_RNG = np.random.default_rng(0)
_LEFT, _ = np.linalg.qr(_RNG.normal(size=(24, 6)))
# Its rows are the eigenvectors.
RIGHT, _ = np.linalg.qr(_RNG.normal(size=(6, 6)))
DATA = {"x": _LEFT * np.sqrt(24 * SPECTRUM) @ RIGHT}
HESSIAN = DATA["x"].T @ DATA["x"] / 24


def loss(params, batch):
  """Half the mean square of the rows' products: the Hessian is their Gram."""
  w = jnp.concatenate([params["a"], params["b"]])
  return 0.5 * jnp.mean((batch["x"] @ w) ** 2)


def tree(vector):
  """The vector as a tree of two leaves."""
  return {"a": jnp.asarray(vector[:2]), "b": jnp.asarray(vector[2:])}

"""F-SAM once more, from the equations: NumPy, flat vectors, no JAX.

Everything is one long vector of doubles. The transformations under test work
on trees, in the dtypes of their leaves and with one fused recurrence; here each
equation is a line of its own, in the order in which it is printed.
"""

import numpy as np


def schedule_of(value):
  """A constant is the schedule that ignores the step."""
  return value if callable(value) else lambda t: value


class FriendlySam:
  """The ascent. Call it with each gradient to get each perturbation."""

  def __init__(self, rho, sigma, lmbda, adaptive=False, order="official"):
    self.rho, self.sigma, self.lmbda = map(schedule_of, (rho, sigma, lmbda))
    self.adaptive = adaptive
    self.order = order
    self.average = None
    self.step = 0

  def direction(self, gradient):
    sigma, lmbda = self.sigma(self.step), self.lmbda(self.step)
    if self.order == "official":
      if self.average is None:
        self.average = np.array(gradient)
        return gradient
      direction = gradient - sigma * self.average
      self.average = lmbda * self.average + (1 - lmbda) * gradient
      return direction
    if self.average is None:
      self.average = np.zeros_like(gradient)
    self.average = lmbda * self.average + (1 - lmbda) * gradient
    return gradient - sigma * self.average

  def __call__(self, gradient, weights):
    direction, rho = self.direction(gradient), self.rho(self.step)
    self.step += 1
    if self.adaptive:
      length = np.sqrt(np.sum((np.abs(weights) * direction) ** 2))
      return rho * weights**2 * direction / (length + 1e-12)
    return rho * direction / (np.sqrt(np.sum(direction**2)) + 1e-12)

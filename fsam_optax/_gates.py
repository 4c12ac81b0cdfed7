"""The gates: at which steps the weights are perturbed."""

import dataclasses
from typing import Any, Optional, Self

from jax import core


@dataclasses.dataclass(frozen=True)
class Gates:
  """Every k-th step from `start` on, before `stop`."""

  every: int = 1
  start: int = 0
  stop: Optional[int] = None

  @property
  def is_shut(self) -> bool:
    """Whether no step ascends."""
    return self.stop is not None and self.stop <= self.start

  @property
  def is_gated(self) -> bool:
    """Whether some steps ascend and others do not."""
    has_gate = self.every > 1 or self.start > 0 or self.stop is not None
    return has_gate and not self.is_shut

  def gate(self, step: Any) -> Any:
    """Whether a step ascends, traced if it is; None where no state counts."""
    if not self.is_gated:
      return not self.is_shut
    if step is None:
      raise ValueError(
        "`perturbation` must count its updates for `every`, `start` and "
        "`stop`, got one without a count. Build it with `scale_to_radius`."
      )
    is_open = (step >= self.start) & ((step - self.start) % self.every == 0)
    if self.stop is not None:
      is_open = is_open & (step < self.stop)
    return is_open if isinstance(is_open, core.Tracer) else bool(is_open)

  def always(self, ascends: bool) -> Self:
    """The same with an ascent at every step, or at none."""
    stop = None if ascends else 0
    return dataclasses.replace(self, every=1, start=0, stop=stop)

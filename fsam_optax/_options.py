"""The options of the two passes: replicas, rows, and what ascends when."""

import dataclasses
import functools
from typing import Any, Literal, Optional, TypedDict, Union

from jax import core
import numpy as np

from fsam_optax._fsam import AxisName
from fsam_optax._fsam import axes_of

EmaGradient = Literal["ascent", "descent"]


class PassOptions(TypedDict, total=False):
  """Which replicas, rows and steps ascend, and along what.

  Keyword arguments of :func:`fsam_optax.value_and_grad`,
  :func:`fsam_optax.make_train_step` and
  :meth:`fsam_optax.nnx.Optimizer.value_and_grad`.

  Attributes:
    axis_name: name of the axis of :func:`jax.pmap`, :func:`jax.shard_map` or
      :func:`jax.vmap` over which the replicas average loss and gradients, or a
      tuple of such names. None, the default, averages nothing, which is right
      under :func:`jax.jit` alone: there the arrays' shardings say where the
      step runs. The aux of each replica is its own.
    sync_perturbation: whether all replicas and all micro-batches ascend along
      the mean gradient; True by default, so that N devices do what one does on
      the whole batch. False: each ascends along its own (m-sharpness). A name
      out of ``axis_name``, or a tuple of names: the mean is over the replicas
      on those axes, and over the micro-batches. The moving average is the same
      on all replicas in any case.
    ema_gradient: which gradient updates the moving average: ``"ascent"``, the
      default, the mean gradient at the clean parameters, or ``"descent"``, the
      mean gradient that is returned. With ``sync_perturbation=False`` the
      replicas then average one gradient a step, not two.
    num_microbatches: number n of micro-batches, 1 by default. A batch of B rows
      is split, and one micro-batch is in memory at a time; row i goes to
      micro-batch i modulo n. Loss, aux and gradients are means over them, and
      the state is updated once. The aux must then be floating scalars.
    weight: name of an entry of the aux, which then is a dict: how much the rows
      of a micro-batch or replica count, such as their number of tokens, for a
      loss that divides by it. Loss, gradients and the rest of the aux are then
      weighted means, and that entry is the sum. A part of weight 0 does not
      count, whatever its loss, and leaves the model's statistics as they were.
      None by default.
    ascent_fraction: fraction of the rows, in (0, 1], that the first pass sees;
      1 by default. A step then costs 1 + ``ascent_fraction`` gradients. Of the
      rows of each replica and micro-batch it takes the first p of every q,
      where p / q is the fraction. The loss that is returned is of these rows.
      So its difference from the perturbed loss is not the sharpness alone, but
      also the difference between two samples.
    every: ascend at every k-th step, 1 by default. The other steps take one
      pass over all rows, and update the average by its gradient.
    start: first step at which to ascend, 0 by default.
    stop: first step at which not to ascend any more; None, the default, for
      never.
    checked: whether each call looks for mistakes in a new loop, at the cost of
      another gradient and a call of the host; False by default. It finds a loss
      that returns another value or gradient when it is called again; replicas
      of the same parameters whose averages differ, because ``axis_name`` is
      missing; a state that was not carried on. An uncompiled call raises an
      error; a compiled one prints it, and returns NaN as loss and gradient. JAX
      has no such call where some axes alone are manual in ``jax.shard_map``.
  """

  axis_name: Optional[AxisName]
  sync_perturbation: Union[bool, AxisName]
  ema_gradient: EmaGradient
  num_microbatches: int
  weight: Optional[str]
  ascent_fraction: float
  every: int
  start: int
  stop: Optional[int]
  checked: bool


@dataclasses.dataclass(frozen=True)
class Options:
  """The options with their defaults, checked; see :class:`PassOptions`."""

  every: int = 1
  start: int = 0
  stop: Optional[int] = None
  axis_name: Optional[AxisName] = None
  sync_perturbation: Union[bool, AxisName] = True
  ema_gradient: EmaGradient = "ascent"
  num_microbatches: int = 1
  weight: Optional[str] = None
  ascent_fraction: float = 1.0
  checked: bool = False

  def __post_init__(self):
    _ = self.ascent_axes  # Raises where the names do not fit.
    if self.ema_gradient not in ("ascent", "descent"):
      raise ValueError(
        "`ema_gradient` must be 'ascent' or 'descent', got "
        f"{self.ema_gradient!r}. The paper's is 'ascent', the gradient at the "
        "clean parameters."
      )
    _check_fraction(self.ascent_fraction)
    check_int("num_microbatches", self.num_microbatches, least=1)
    check_int("every", self.every, least=1)
    check_int("start", self.start, least=0)
    if self.stop is not None:
      check_int("stop", self.stop, least=0)
      if self.stop < self.start:
        raise ValueError(
          f"`stop` must not be below `start`, got {self.stop} for `start="
          f"{self.start}`. To never ascend, give `stop=0` alone."
        )

  @classmethod
  def from_keywords(cls, options: PassOptions) -> "Options":
    """The options in a function's keyword arguments."""
    names = [field.name for field in dataclasses.fields(cls)]
    if unknown := sorted(options.keys() - set(names)):
      raise TypeError(
        f"`{unknown[0]}` must be one of the options {', '.join(names)}. See "
        "the documentation of `fsam_optax.value_and_grad`."
      )
    return cls(**options)

  @functools.cached_property
  def moved_from(self) -> dict[int, Any]:
    """The count that `checked` saw in the last call, for each replica."""
    return {}

  @property
  def axes(self) -> tuple[str, ...]:
    """The names of all axes over which replicas average."""
    return axes_of("axis_name", self.axis_name)

  @property
  def ascent_axes(self) -> tuple[str, ...]:
    """The axes over which the ascent's gradient is averaged, in order."""
    sync, axes = self.sync_perturbation, self.axes
    if isinstance(sync, bool):
      return axes if sync else ()
    if not axes or not isinstance(sync, (str, tuple)):
      raise TypeError(
        "`sync_perturbation` must be a bool, or names out of `axis_name`, got "
        f"{sync!r}."
      )
    chosen = axes_of("sync_perturbation", sync)
    if unknown := [axis for axis in chosen if axis not in axes]:
      raise ValueError(
        f"`sync_perturbation` must name axes out of `axis_name`, {axes}, got "
        f"{unknown}. Name the axis of the mesh that a group of replicas spans."
      )
    return tuple(axis for axis in axes if axis in chosen)

  @property
  def other_axes(self) -> tuple[str, ...]:
    """The axes along which each replica has an ascent of its own."""
    return tuple(axis for axis in self.axes if axis not in self.ascent_axes)

  @property
  def splits_rows(self) -> bool:
    """Whether a pass takes a part of the batch, so that rows must be known."""
    return self.num_microbatches > 1 or self.ascent_fraction < 1

  @property
  def is_part_by_part(self) -> bool:
    """Whether each micro-batch ascends along its own gradient."""
    return self.num_microbatches > 1 and self.sync_perturbation is False

  @property
  def is_local(self) -> bool:
    """Whether replicas or micro-batches ascend along different gradients."""
    return self.is_part_by_part or bool(self.other_axes)

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

  def always(self, ascends: bool) -> "Options":
    """The same with an ascent at every step, or at none."""
    stop = None if ascends else 0
    return dataclasses.replace(self, every=1, start=0, stop=stop)


def _check_fraction(fraction: Any) -> None:
  is_number = isinstance(fraction, (int, float, np.number))
  if isinstance(fraction, bool) or not is_number:
    raise TypeError(
      f"`ascent_fraction` must be a real number, got {fraction!r}."
    )
  if not 0 < fraction <= 1:
    raise ValueError(
      f"`ascent_fraction` must be in (0, 1], got {fraction}. To never ascend, "
      "use rho=0 or the base optimizer alone."
    )


def check_int(name: str, value: object, least: int) -> None:
  """Raises unless `value` is an int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
    raise TypeError(f"`{name}` must be an int, got {value!r}.")
  if value < least:
    raise ValueError(f"`{name}` must be at least {least}, got {value}.")

"""What the value of a flag must be: annotations for the fields of settings.

As in ``rho: Annotated[float, number(0)] = 0.05``. Each reads one word, and
raises a ValueError that says what must hold, what it got and the remedy; tyro
prints it with the name of the flag.
"""

import functools
import math
from typing import Any, Callable, Iterable, Sequence

import numpy as np
import tyro


def value(
  metavar: str, parse: Callable[[str], Any], show: Callable[[Any], str] = str
) -> Any:
  """An annotation for a value that is written as one word.

  Args:
    metavar: what stands for the word in the help.
    parse: from the word to the value; may raise a ValueError.
    show: from a default to its word.
  """
  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=metavar,
    instance_from_str=lambda words: parse(words[0]),
    is_instance=lambda _: True,
    str_from_instance=lambda x: ["none" if x is None else show(x)],
  )


def default(text: str) -> Any:
  """An annotation: what the help says of a default that depends on others."""
  return tyro.conf.arg(help_behavior_hint=f"(default: {text})" if text else "")


def number(
  lower: float, upper: float = math.inf, *, metavar: str = "X", **options: Any
) -> Any:
  """An annotation for a number in a range; see :func:`parse_number`."""
  parse = functools.partial(parse_number, lower=lower, upper=upper, **options)
  return value(metavar, parse, lambda x: f"{x:g}")


def parse_number(
  text: str,
  lower: float,
  upper: float = math.inf,
  *,
  above: bool = False,
  below: bool = False,
  kind: Callable[[str], float] = float,
  remedy: str = "",
) -> float:
  """Reads a number from ``lower`` to ``upper``; infinity is never taken.

  With ``above`` the lower end itself is refused, with ``below`` the upper end.
  The kind is ``float`` or ``int``. The remedy says what to write, such as ``"1
  is F-SAM, 0 is SAM"``.
  """
  below = below or upper == math.inf
  try:
    found = kind(text)
  except ValueError:
    found = math.nan
  # JAX computes in float32, where a number may be an end of the range.
  with np.errstate(over="ignore"):
    rounded = found if kind is int else float(np.float32(found))
  is_end = (above and rounded == lower) or (below and rounded == upper)
  is_end = is_end or (rounded != found and rounded in (lower, upper))
  if not lower <= found <= upper or is_end:
    span = f"{'(' if above else '['}{lower}, {upper}{')' if below else ']'}"
    what = "an integer" if kind is int else "a number"
    message = f"must be {what} in {span}, got {text!r}"
    raise ValueError("; ".join(filter(None, (message, remedy))))
  return found


def integer(
  lower: int, upper: int = 10**9, *, metavar: str = "N", **options: Any
) -> Any:
  """An annotation for a whole number in a range; see :func:`parse_number`."""
  return number(lower, upper, metavar=metavar, kind=int, **options)


def choice(names: Iterable[str]) -> Any:
  """An annotation for one of some names."""

  def parse(text: str) -> str:
    if text not in names:
      raise ValueError(f"must be one of {', '.join(names)}, got {text!r}")
    return text

  return value(f"{{{','.join(names)}}}", parse)


def some_of(names: Sequence[str]) -> Any:
  """An annotation for a tuple of one or more of some names."""
  choices = tyro.extras.literal_type_from_choices(names)
  return tyro.conf.arg(constructor=tuple[choices, ...])


PerOptimizer = dict[str, tuple[float, ...]]
"""Values by optimizer; those under the empty name are for all others."""


def per_optimizer(
  names: Sequence[str], *, metavar: str, above: bool = False
) -> Any:
  """An annotation of a :data:`PerOptimizer`: values for all, or for each.

  ``0.1`` is ``{"": (0.1,)}``, and ``sam=0.1,fsam=0.2:0.4`` is
  ``{"sam": (0.1,), "fsam": (0.2, 0.4)}``.

  Args:
    names: the optimizers that have such a value.
    metavar: what stands for it in the help.
    above: whether 0 is refused.
  """
  remedy = f"write 0.1, {names[0]}=0.1,fsam=0.2 or {names[0]}=0.1:0.2:0.4"

  def grid(text: str) -> tuple[float, ...]:
    parts = text.split(":")
    of = functools.partial(parse_number, lower=0, above=above, remedy=remedy)
    return tuple(sorted({of(part) for part in parts}))

  def parse(text: str) -> PerOptimizer:
    if "=" not in text:
      return {"": grid(text)}
    parts = [part.partition("=") for part in text.split(",")]
    named = [name for name, _, _ in parts]
    if set(named) - set(names) or len(set(named)) < len(named):
      raise ValueError(
        f"must be one value or one for each of {', '.join(names)}, got "
        f"{text!r}; {remedy}"
      )
    return {name: grid(values) for name, _, values in parts}

  return value(metavar, parse)

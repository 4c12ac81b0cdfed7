"""What the value of a flag must be: annotations for the fields of settings.

As in ``rho: Annotated[float, number(0, remedy="0.05 is usual")] = 0.05``. Each
reads one word. The sentence that refuses a word says what must hold, what came
and the remedy; :func:`fsam_optax.experiments.common.flags.parse` puts the name
of the flag in front.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np
import tyro


def _in_float32(number: float) -> float:
  """The number that float32 makes of one; infinity where it is too large."""
  with np.errstate(over="ignore"):
    return float(np.float32(number))


class Refused(NamedTuple):
  """Stands in the place of a value that its annotation refused.

  Attributes:
    message: why, without the name of the flag, which nobody knows here.
  """

  message: str


def value(
  metavar: str,
  parse: Callable[[str], Any],
  show: Callable[[Any], str] = str,
) -> Any:
  """An annotation for what is written as one word.

  Args:
    metavar: what stands for the word in the help.
    parse: from the word to the value. Raises a ValueError that says what must
      hold, what came and the remedy.
    show: from a default to its word.

  Returns:
    To be used as in ``Annotated[float, value("R", parse)]``.
  """

  def instance_from_str(words: list[str]) -> Any:
    try:
      return parse(words[0])
    except ValueError as error:
      return Refused(str(error))

  return tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar=metavar,
    instance_from_str=instance_from_str,
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
  remedy: str,
  above: bool = False,
  below: bool = False,
) -> float:
  """Reads a number that is in a range, also after float32 has rounded it.

  Args:
    text: the word.
    lower: the least.
    upper: the greatest; infinity itself is never taken.
    remedy: what to write, such as ``"1 is F-SAM, 0 is SAM"``.
    above: whether ``lower`` itself is too low.
    below: whether ``upper`` itself is too high.

  Raises:
    ValueError: if it is none.
  """
  if upper == math.inf:
    what = "a finite number" + (
      f" above {lower:g}" if above else f", {lower:g} or more"
    )
  else:
    brackets = "(" if above else "[", ")" if below else "]"
    what = f"a number in {brackets[0]}{lower:g}, {upper:g}{brackets[1]}"
  try:
    found = float(text)
  except ValueError:
    found = math.nan

  def is_inside(x: float) -> bool:
    is_end = (x == lower and not above) or (x == upper and not below)
    return (lower < x < upper or is_end) and not math.isinf(x)

  if not is_inside(found):
    raise ValueError(f"must be {what}, got {text!r}; {remedy}")
  narrow = _in_float32(found)
  if not is_inside(narrow) or (found and not narrow):
    raise ValueError(
      f"must be {what} in float32, too, where it is {narrow:g}, got {text!r}; "
      f"{remedy}"
    )
  return found


def integer(
  lower: int, upper: int = 10**9, *, remedy: str, metavar: str = "N"
) -> Any:
  """An annotation for a whole number from ``lower`` to ``upper``."""

  def parse(text: str) -> int:
    try:
      found = int(text)
    except ValueError:
      found = lower - 1
    if not lower <= found <= upper:
      raise ValueError(
        f"must be an integer from {lower} to {upper}, got {text!r}; {remedy}"
      )
    return found

  return value(metavar, parse)


def choice(names: Iterable[str], metavar: str = "") -> Any:
  """An annotation for one of some names.

  Args:
    names: looked at when a flag is read, so that a registry may still grow.
    metavar: what stands for it in the help; empty for the names themselves.

  Returns:
    The annotation.
  """

  def parse(text: str) -> str:
    if text not in names:
      raise ValueError(f"must be one of {', '.join(names)}, got {text!r}")
    return text

  return value(metavar or f"{{{','.join(names)}}}", parse)


def numbers(example: str, *, above: float = -math.inf) -> Any:
  """An annotation for finite numbers above some other, with commas between."""

  def parse(text: str) -> tuple[float, ...]:
    try:
      found = tuple(float(part) for part in text.split(","))
    except ValueError:
      found = (math.nan,)
    narrow = map(_in_float32, found)
    if not all(math.isfinite(x) and x > above for x in narrow):
      what = "finite numbers"
      if above > -math.inf:
        what = f"numbers above {above:g}"
      raise ValueError(
        f"must be {what} with commas between, that float32 holds, got "
        f"{text!r}; for example "
        f"{example}"
      )
    return found

  return value("R,G,B", parse, lambda x: ",".join(map(str, x)))


def some_of(names: Sequence[str], *, example: str) -> Any:
  """An annotation for one or more of some names, each once."""

  def parse(text: str) -> tuple[str, ...]:
    found = tuple(text.split(","))
    if set(found) - set(names) or len(set(found)) < len(found):
      raise ValueError(
        f"must be one or more of {', '.join(names[:-1])} and {names[-1]} with "
        f"commas between, each once, got {text!r}; for example {example}"
      )
    return found

  return value("LIST", parse, ",".join)


PerOptimizer = dict[str, tuple[float, ...]]
"""Values by optimizer; those under the empty name are for all others."""


def per_optimizer(
  names: Sequence[str],
  *,
  metavar: str,
  above_zero: str = "",
) -> Any:
  """An annotation for one value or a grid, or one for each optimizer.

  Args:
    names: the optimizers that have such a value.
    metavar: what stands for it in the help.
    above_zero: why 0 is refused; empty where it is not.

  Returns:
    The annotation of a :data:`PerOptimizer`: ``0.1`` is ``{"": (0.1,)}`` and
    ``sam=0.1,fsam=0.2:0.4`` is ``{"sam": (0.1,), "fsam": (0.2, 0.4)}``.
  """
  example = f"0.1, {names[0]}=0.1,fsam=0.2 or {names[0]}=0.1:0.2:0.4"

  def values(text: str) -> tuple[float, ...]:
    found = tuple(
      parse_number(part, 0, remedy=f"write {example}")
      for part in text.split(":")
    )
    if above_zero and 0 in found:
      raise ValueError(f"must be positive, got {text!r}; {above_zero}")
    return tuple(sorted(set(found)))

  def parse(text: str) -> PerOptimizer:
    if "=" not in text:
      return {"": values(text)}
    found: PerOptimizer = {}
    for part in text.split(","):
      optimizer, _, number = part.partition("=")
      if optimizer not in names or optimizer in found:
        raise ValueError(
          f"must be one value or one for each of {', '.join(names)}, got "
          f"{text!r}; write {example}"
        )
      found[optimizer] = values(number)
    return found

  return value(metavar, parse)

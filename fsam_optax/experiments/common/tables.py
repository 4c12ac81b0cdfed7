"""Numbers and tables as a terminal shows them."""

from collections.abc import Sequence
from typing import Optional


def with_error(
  mean: float, error: Optional[float], *, signed: bool = False
) -> str:
  """Formats a mean with its standard error.

  Examples:
    >>> with_error(80.123, 0.161), with_error(0.5, None, signed=True)
    ('80.12 ± 0.16', '+0.50 ± n/a')
  """
  number = f"{mean:+.2f}" if signed else f"{mean:.2f}"
  return f"{number} ± " + ("n/a" if error is None else f"{error:.2f}")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Aligns columns, the first to the left and the others to the right.

  Examples:
    >>> print(table(["name", "value"], [["a", "1.0"], ["bcdef", "10.0"]]))
    name   value
    a        1.0
    bcdef   10.0
  """
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.rjust(width) if i else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )

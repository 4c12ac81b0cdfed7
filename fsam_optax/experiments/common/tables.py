"""Tables: rows of numbers as a JSON holds them, and as they are shown.

A table is ``{"header": [...], "rows": [[cell, ...], ...]}``, perhaps with a
``"title"`` above it. A cell is text, a number, or found over seeds, by its
first field:

- ``{"accuracy": mean, "error": ...}``, with ``"median"``, ``"collapsed"`` and
  ``"diverged"`` where runs collapsed or diverged;
- ``{"difference": mean, "error": ...}``, perhaps with ``"search_error"``,
  ``"median"``, and what it is ``"over"``;
- ``{"value": mean, "error": ...}``, to three digits.

A mean is None where nothing is finite, an error for a single seed.
"""

from typing import Any, Optional, Sequence


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


def shown(cell: Any) -> str:
  """A cell as text.

  Examples:
    >>> shown(0.05), shown({"value": 0.12345, "error": 0.0123})
    ('0.05', '0.123 ± 0.01')
    >>> shown({"difference": 1.5, "error": 0.2, "median": 1, "over": "SAM"})
    'over SAM: +1.50 ± 0.20, median +1.00'
    >>> shown({"accuracy": 65.75, "error": 15.25, "median": 80.5,
    ...        "collapsed": 1})
    '65.75 ± 15.25 (median 80.50, 1 collapsed)'
  """
  if not isinstance(cell, dict):
    return cell if isinstance(cell, str) else f"{cell:g}"
  kind, mean = next(iter(cell.items()))
  error = cell.get("error")
  if kind == "value":
    text = "-" if mean is None else f"{mean:.3g}"
    if mean is None or error is None:
      return text
    return f"{text} ± " + (f"{error:.0f}" if error >= 9.5 else f"{error:.1g}")
  is_difference = kind == "difference"
  text = "-" if mean is None else with_error(mean, error, signed=is_difference)
  if "search_error" in cell:
    text += f" (± {cell['search_error']:.2f} with the search)"
  if is_difference and "median" in cell:
    text += f", median {cell['median']:+.2f}"
  if "over" in cell:
    text = f"over {cell['over']}: {text}"
  if "collapsed" in cell:
    text += f" (median {cell['median']:.2f}, {cell['collapsed']} collapsed)"
  if "diverged" in cell:
    text += f" ({cell['diverged']} diverged)"
  return text


def text(found: dict[str, Any]) -> str:
  """A table as a terminal shows it."""
  rows = [[shown(cell) for cell in row] for row in found["rows"]]
  above = [found["title"]] if "title" in found else []
  return "\n".join([*above, table(found["header"], rows)])


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

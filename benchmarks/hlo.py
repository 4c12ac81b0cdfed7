"""Finds the collectives in a compiled program, and their place in it.

The text is that of ``jax.stages.Compiled.as_text()``. It has computations of
instructions. Each instruction has the shape of its result, its operands, the
computations that it calls and the scope of its JAX operation.
"""

from collections.abc import Iterator
import functools
import math
import re
from typing import NamedTuple, Optional

KINDS = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
  "collective-broadcast",
  "ragged-all-to-all",
)
_PRODUCTS = ("convolution", "dot")
_ASCENT, _DESCENT = "ascent", "descent"  # The named scopes of the two passes.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"\b(?:calls|to_apply|body|condition|true_computation|false_computation"
  r"|branch_computations|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


class Collective(NamedTuple):
  """One communication between the devices.

  Attributes:
    kind: one of :data:`KINDS`.
    shapes: dimensions of each array, of the operands or the results, whichever
      are larger.
    count: number of runs in a step, more than one in a loop.
    is_between: whether it is between the two passes: it needs a matrix product
      of the first pass and none of the second, and a product of the second
      waits for it and none of the first.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  count: int
  is_between: bool

  @property
  def words(self) -> int:
    """Elements of the whole arrays, over all runs."""
    return self.count * sum(math.prod(shape) for shape in self.shapes)


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  operands: list[str]
  called: list[str]
  trips: int
  scope: str
  channel: str


def collectives(text: str) -> list[Collective]:
  """Every collective of a compiled program, in the order of its text."""
  computations, entry = _parse(text)
  counts = dict.fromkeys(computations, 0) | {entry: 1}
  fused = set()
  # The text has each computation before those that call it.
  for name, instructions in reversed(computations.items()):
    for x in instructions:
      for called in x.called:
        counts[called] += counts[name] * x.trips
      if x.opcode == "fusion":
        fused.update(x.called)
  passes: dict[str, set[str]] = {}
  for name, instructions in computations.items():
    passes[name] = set().union(*(_passes(x, passes) for x in instructions))
  found = {}
  for name, instructions in computations.items():
    if not counts[name] or name in fused:
      continue
    between = _between(instructions, passes)
    by_name = {x.name: x for x in instructions}
    for x in instructions:
      for collective, inside in _within(x, computations):
        # A collective that overlaps computations is in several fusions.
        key = collective.channel if inside else (name, x.name)
        if key in found:
          continue
        sources = inside or by_name
        operands = [
          shape
          for operand in collective.operands
          for shape in _shapes(sources[operand].shape)
        ]
        results = _shapes(collective.shape)
        kind = _kind(collective)
        if collective.opcode.endswith("-start") and kind != "all-reduce":
          # These results are the operands, the results and flags.
          results = results[len(operands) : 2 * len(operands)]
        found[key] = Collective(
          kind,
          tuple(max(operands, results, key=lambda s: sum(map(math.prod, s)))),
          counts[name],
          x.name in between,
        )
  return list(found.values())


_NO_TRAFFIC = (
  "parameter",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "constant",
  "iota",
  "after-all",
)


def main_memory_bytes(text: str) -> int:
  """Bytes that a program moves to and from the main memory of the device.

  XLA's own count, ``bytes accessed``, does not distinguish the memories of a
  TPU. An array that is copied into the fast memory and read there counts three
  times; here it counts once. An operation counts its whole operands and result,
  even where it reads a part. A conditional counts its larger branch.
  """
  computations, entry = _parse(text)
  return _main_memory_bytes(entry, computations)


def _main_memory_bytes(name, computations) -> int:
  instructions = {x.name: x for x in computations[name]}
  shape_of = lambda operand: instructions[operand].shape
  in_main_memory = functools.partial(_bytes, in_main_memory=True)
  total = 0
  for x in instructions.values():
    if x.opcode in _NO_TRAFFIC or x.opcode.endswith("-start"):
      continue
    if x.opcode in ("conditional", "while", "call"):
      inner = [_main_memory_bytes(name, computations) for name in x.called]
      total += max(inner) if x.opcode == "conditional" else x.trips * sum(inner)
    elif x.opcode.endswith("-done"):
      # A copy reads from its source as many bytes as it writes.
      source = shape_of(instructions[x.operands[0]].operands[0])
      total += in_main_memory(x.shape)
      total += _bytes(x.shape) if in_main_memory(source) else 0
    else:
      total += sum(map(in_main_memory, [x.shape, *map(shape_of, x.operands)]))
  return total


def _bytes(shape: str, *, in_main_memory: bool = False) -> int:
  """Bytes of all arrays, or of those that are not in a fast memory."""
  bits = 0
  for kind, dimensions, layout in _arrays(shape):
    if not (in_main_memory and re.search(r"S\([1-9]\)", layout)):
      own = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
      bits += own * math.prod(dimensions)
  return bits // 8


def _within(instruction, computations):
  """The collectives of an instruction: itself, or those in a fusion.

  They come in pairs with the instructions of the fusion by name, or None.
  """
  if _kind(instruction):
    yield instruction, None
  elif instruction.opcode == "fusion":
    for called in instruction.called:
      inside = {x.name: x for x in computations[called]}
      yield from ((x, inside) for x in inside.values() if _kind(x))


def _parse(text) -> tuple[dict[str, list[_Instruction]], str]:
  """The instructions of every computation, and the name of the entry."""
  computations, entry, current = {}, "", []
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = computations[match[2]] = []
      if match[1]:
        entry = match[2]
    elif match := _INSTRUCTION.match(line):
      name, rest = match.groups()
      shape, rest = _cut(rest) if rest[0] == "(" else rest.split(" ", 1)
      opcode, rest = rest.strip().split("(", 1)
      operands, attributes = _cut("(" + rest)
      trips = re.search(r'known_trip_count":\{"n":"(\d+)"', attributes)
      scope = re.search(r'op_name="([^"]*)"', attributes)
      channel = re.search(r"\bchannel_id=(\d+)", attributes)
      current.append(
        _Instruction(
          name,
          shape,
          opcode,
          _NAME.findall(operands),
          _NAME.findall(" ".join(_CALLED.findall(attributes))),
          int(trips[1]) if trips else 1,
          scope[1] if scope else "",
          channel[1] if channel else f"of {name}",
        )
      )
  if not entry:
    raise ValueError("`text` must be a compiled program with an ENTRY.")
  return computations, entry


def _cut(text: str) -> tuple[str, str]:
  """Splits after the parenthesis that closes the first."""
  depth = 0
  for position, character in enumerate(text):
    depth += {"(": 1, ")": -1}.get(character, 0)
    if depth == 0:
      return text[: position + 1], text[position + 1 :]
  raise ValueError(f"no parenthesis closes the first of {text[:80]!r}")


def _arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...], str]]:
  """The type, the dimensions and the layout of each array of a shape."""
  array = r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?"
  for kind, dimensions, layout in re.findall(array, shape):
    sizes = [n.strip("<=") for n in dimensions.split(",") if n]
    yield kind, tuple(map(int, sizes)), layout


def _shapes(shape: str) -> list[tuple[int, ...]]:
  return [dimensions for _, dimensions, _ in _arrays(shape)]


def _kind(instruction: _Instruction) -> Optional[str]:
  kind = instruction.opcode.removesuffix("-start")
  return kind if kind in KINDS else None


def _passes(instruction, passes) -> set[str]:
  """The passes whose matrix products an instruction has or calls.

  Other operations may serve both.
  """
  found = set().union(*(passes[called] for called in instruction.called))
  if instruction.opcode in _PRODUCTS:
    found |= {_ASCENT, _DESCENT} & {*re.split(r"[/()]", instruction.scope)}
  return found


def _between(instructions, passes) -> set[str]:
  """Names of what is between the two passes, in one computation."""
  before: dict[str, set[str]] = {}  # Passes among what an instruction needs.
  own: dict[str, set[str]] = {}
  for x in instructions:
    own[x.name] = _passes(x, passes)
    before[x.name] = set().union(
      *(before[y] | own[y] for y in x.operands if y in before)
    )
  after: dict[str, set[str]] = {x.name: set() for x in instructions}
  for x in reversed(instructions):
    for y in x.operands:
      if y in after:
        after[y] |= after[x.name] | own[x.name]
  return {
    x.name
    for x in instructions
    if before[x.name] == {_ASCENT} and after[x.name] == {_DESCENT}
  }

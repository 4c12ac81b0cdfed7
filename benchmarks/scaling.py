"""How the cost of a step grows: with parameters, depth, batch and leaves.

Each point compiles SGD, the floor (two gradients and an update), F-SAM in a
chain, the default train step and optax.contrib.sam, and times them in turn. The
leaves are those of many small linear units; the other three are perceptrons.

  python benchmarks/scaling.py [--quick] [--output scaling.json]
                               [--plot scaling.png]
"""

import argparse
import json
import os
from typing import Any

import jax
import step_cost
import workloads

NAMES = (
  "SGD",
  "floor",
  "optax.contrib.sam",
  "fsam in a chain",
  "train step, no skip",
  "train step (default)",
)
WIDTHS = {10**4: 64, 10**5: 256, 10**6: 900, 10**7: 3050, 10**8: 9900}


def points(is_quick: bool) -> list[tuple[str, int, workloads.Workload, int]]:
  """What grows, how far, the model and the rows of a batch."""
  square = lambda width, depth: workloads.mlp((64, *(width,) * (depth + 1), 10))
  found = [
    ("parameters", size, square(width, 1), 32) for size, width in WIDTHS.items()
  ]
  found += [
    ("depth", depth, square(256, depth), 32) for depth in (2, 8, 32, 64)
  ]
  found += [
    ("batch", rows, square(900, 1), rows) for rows in (1, 8, 64, 512, 2048)
  ]
  found += [
    ("leaves", leaves, workloads.many_leaves(leaves), 32)
    for leaves in (1, 30, 300)  # More take XLA minutes to compile on a CPU.
  ]
  return found[:1] if is_quick else found


def plot(rows: list[dict[str, Any]], path: str) -> None:
  """Time over the floor, and seconds to compile."""
  from matplotlib import pyplot as plt

  kinds = list(dict.fromkeys(row["grows"] for row in rows))
  figure, axes = plt.subplots(
    2, len(kinds), figsize=(3.2 * len(kinds), 5), squeeze=False, sharex="col"
  )
  for column, kind in enumerate(kinds):
    for name in NAMES:
      chosen = [r for r in rows if r["grows"] == kind and r["step"] == name]
      sizes = [r["size"] for r in chosen]
      for line, field in enumerate(("ratio_to_floor", "compile_seconds")):
        axes[line, column].plot(
          sizes, [r[field] for r in chosen], "o-", label=name, markersize=3
        )
    axes[0, column].set_title(kind)
    axes[1, column].set_xscale("log")
    axes[1, column].set_xlabel(kind)
  axes[0, 0].set_ylabel("time over the floor")
  axes[1, 0].set_ylabel("seconds to compile")
  axes[0, 0].legend(fontsize=6)
  figure.tight_layout()
  figure.savefig(path, dpi=150)


def main():
  """Measures and prints a row a point and step."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--rounds", type=int, default=15)
  parser.add_argument(
    "--quick", action="store_true", help="one small point, to see it run"
  )
  parser.add_argument("--output", help="also write the rows to this JSON file")
  parser.add_argument("--plot", help="also draw them here")
  args = parser.parse_args()
  print(f"{os.cpu_count()} cores, jax {jax.__version__}")
  columns = step_cost.COUNTED + step_cost.TIMED + step_cost.COMPILED[-1:]
  print(step_cost.heading(columns))
  rows = []
  for grows, size, workload, batch_size in points(args.quick):
    rounds = 2 if args.quick else args.rounds
    for row in step_cost.measure(workload, batch_size, rounds, NAMES):
      rows.append({**row, "grows": grows, "size": size})
      row["model"] = f"{grows} {size}"
      print(step_cost.line_of(row, columns), flush=True)
  if args.output:
    with open(args.output, "w") as file:
      json.dump({"versions": {"jax": jax.__version__}, "rows": rows}, file)
  if args.plot:
    plot(rows, args.plot)


if __name__ == "__main__":
  main()

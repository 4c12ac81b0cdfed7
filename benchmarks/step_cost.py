"""What a step of F-SAM costs, against its floor and against its peers.

The floor is what no sharpness-aware step can undercut: two dependent gradients
and one optimizer update, with no norm and no moving average. XLA counts the
bytes that the compiled step reads and writes and the temporary memory it
allocates; both are printed in words (4 bytes) a parameter. Times are medians of
interleaved runs, given as ratios to the floor's and to plain SGD's of the same
round. With ``--peers``, the same models in PyTorch by pytorch_optimizer run in
the same rounds, as ratios to PyTorch's SGD:

  pip install torch pytorch_optimizer
  python benchmarks/step_cost.py --peers --peak --models mlp cnn transformer

  python benchmarks/step_cost.py [--models mlp] [--batch-sizes 8 256]
                                 [--rounds 40] [--output step_cost.json]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax
import workloads

import fsam_optax

RHO = 0.05


class Step(NamedTuple):
  """A step to measure: its initial state from parameters, and its function."""

  init: Callable[[Any], Any]
  update: Callable[[Any, Any], Any]


def steps(loss_fn: Callable[[Any, Any], jax.Array]) -> dict[str, Step]:
  """The steps by name, each over the same SGD with momentum."""
  base = optax.sgd(0.01, momentum=0.9)

  def sgd(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = base.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), loss

  def floor(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    perturbed = jax.tree.map(lambda w, g: w + RHO * g, params, grads)
    perturbed_loss, grads = jax.value_and_grad(loss_fn)(perturbed, batch)
    updates, opt_state = base.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, opt_state), (loss, perturbed_loss)

  optax_sam = optax.contrib.sam(
    base,
    optax.chain(optax.contrib.normalize(), optax.sgd(RHO)),
    opaque_mode=True,
  )

  def contrib_sam(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = optax_sam.update(
      grads,
      opt_state,
      params,
      grad_fn=jax.grad(lambda p, _: loss_fn(p, batch)),
    )
    return (optax.apply_updates(params, updates), opt_state), loss

  transparent_sam = optax.contrib.sam(
    base, optax.chain(optax.contrib.normalize(), optax.sgd(RHO)), sync_period=2
  )

  def contrib_sam_transparent(state, batch):
    # One call for each of the two gradients.
    for _ in range(2):
      params, opt_state = state
      loss, grads = jax.value_and_grad(loss_fn)(params, batch)
      updates, opt_state = transparent_sam.update(grads, opt_state, params)
      state = (optax.apply_updates(params, updates), opt_state)
    return state, loss

  chain = optax.chain(fsam_optax.fsam(RHO), base)

  def fsam_chain(state, batch):
    params, opt_state = state
    loss, grads = jax.value_and_grad(loss_fn)(params, batch)
    updates, opt_state = chain.update(
      grads,
      opt_state,
      params,
      grad_fn=lambda p: jax.grad(loss_fn)(p, batch),
    )
    return (optax.apply_updates(params, updates), opt_state), loss

  def train_step(perturbation=None, **options):
    def create(params):
      return fsam_optax.TrainState.create(
        apply_fn=None,
        params=params,
        tx=base,
        perturbation=perturbation or fsam_optax.friendly_perturbation(RHO),
      )

    step = fsam_optax.make_train_step(
      lambda params, model_state, batch, rng: (
        loss_fn(params, batch),
        (model_state, {}),
      ),
      jit=False,
      **options,
    )
    return Step(create, step)

  with_opt_state = lambda tx: lambda params: (params, tx.init(params))
  return {
    "SGD": Step(with_opt_state(base), sgd),
    "floor": Step(with_opt_state(base), floor),
    "optax.contrib.sam": Step(with_opt_state(optax_sam), contrib_sam),
    "optax.contrib.sam, transparent": Step(
      with_opt_state(transparent_sam), contrib_sam_transparent
    ),
    "fsam in a chain": Step(with_opt_state(chain), fsam_chain),
    "train step, metrics=(), no skip": train_step(
      metrics=(), skip_nonfinite=False
    ),
    "train step, no skip": train_step(skip_nonfinite=False),
    "train step, metrics=()": train_step(metrics=()),
    "train step (default)": train_step(),
    "train step, 1/8": train_step(ascent_fraction=1 / 8),
    "train step, 1/8, no skip, metrics=()": train_step(
      ascent_fraction=1 / 8, skip_nonfinite=False, metrics=()
    ),
    "train step, SAM": train_step(fsam_optax.sam_perturbation(RHO)),
    "train step, bfloat16 average": train_step(
      fsam_optax.friendly_perturbation(RHO, accumulator_dtype=jnp.bfloat16)
    ),
    "train step, 4 micro-batches": train_step(num_microbatches=4),
    "train step, 4 local": train_step(
      num_microbatches=4, sync_perturbation=False
    ),
    "train step, every 2nd": train_step(every=2),
    "train step, gate shut": train_step(stop=0),
  }


PEERED = (  # What is compared with PyTorch.
  "SGD",
  "floor",
  "optax.contrib.sam",
  "optax.contrib.sam, transparent",
  "fsam in a chain",
  "train step (default)",
  "train step, 1/8",
)


def measure(
  workload: workloads.Workload,
  batch_size: int,
  rounds: int,
  names: tuple[str, ...] = (),
  others: dict[str, Callable[[], Any]] | None = None,
) -> list[dict[str, Any]]:
  """Compiles steps and times them in turn, a row a step.

  Args:
    workload: the model.
    batch_size: rows.
    rounds: interleaved timings of each step.
    names: of :func:`steps`; all where empty.
    others: further steps to time in the same rounds, by name.

  Returns:
    The rows; those of others hold times alone.
  """
  batch = workload.make_batch(np.random.default_rng(0), batch_size)
  make_params = jax.jit(workload.init)
  params = jax.eval_shape(make_params, jax.random.key(0))
  num_params = sum(x.size for x in jax.tree.leaves(params))
  word = 4 * num_params
  compiled, states, rows = {}, {}, []
  for name, step in steps(workload.loss_fn).items():
    if names and name not in names:
      continue
    if "1/8" in name and batch_size % 8:
      continue
    # optax.contrib.sam's state holds the parameters, which are donated, too.
    states[name] = jax.tree.map(
      jnp.copy, step.init(make_params(jax.random.key(0)))
    )
    start = time.perf_counter()
    compiled[name] = (
      jax.jit(step.update, donate_argnums=0)
      .lower(states[name], batch)
      .compile()
    )
    cost = compiled[name].cost_analysis()
    memory = compiled[name].memory_analysis()
    rows.append(
      {
        "step": name,
        "parameters": num_params,
        "batch_size": batch_size,
        "words": cost["bytes accessed"] / word,
        "temporary_words": memory.temp_size_in_bytes / word,
        "flops": cost["flops"],
        "compile_seconds": time.perf_counter() - start,
      }
    )
  calls = {}
  for name, step in compiled.items():

    def call(name=name, step=step):
      states[name], reported = step(states[name], batch)
      jax.block_until_ready((states[name], reported))

    calls[name] = call
  for name, call in (others or {}).items():
    calls[name] = call
    rows.append({"step": name, "batch_size": batch_size})
  calls["SGD"]()
  start = time.perf_counter()
  calls["SGD"]()
  # About as long for every model, and no longer than the clock needs.
  repeats = int(np.clip(0.02 / (time.perf_counter() - start), 1, 20))
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for _ in range(rounds + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      for _ in range(repeats):
        call()
      seconds[name].append((time.perf_counter() - start) / repeats)
  # The first round warms up.
  times = {name: np.array(x[1:]) for name, x in seconds.items()}
  floor = next((row for row in rows if row["step"] == "floor"), None)
  for row in rows:
    name = row["step"]
    sgd = "torch SGD" if name in (others or {}) else "SGD"
    row["milliseconds"] = float(np.median(times[name])) * 1e3
    row["ratio_to_sgd"] = float(np.median(times[name] / times[sgd]))
    if floor is not None and sgd == "SGD":
      ratio = times[name] / times["floor"]
      row["ratio_to_floor"] = float(np.median(ratio))
      row["words_above_floor"] = row["words"] - floor["words"]
  return rows


def peak_megabytes(model: str, batch_size: int, name: str) -> float:
  """Peak memory of a process of its own that takes three steps of one kind."""
  output = subprocess.run(
    [
      sys.executable,
      __file__,
      f"--models={model}",
      f"--batch-sizes={batch_size}",
      f"--peak-of={name}",
    ],
    check=True,
    capture_output=True,
    text=True,
  ).stdout
  return float(output.split()[-1])


def print_peak(model: str, batch_size: int, name: str) -> None:
  """Prints by how many MB three steps, once compiled, exceed the imports."""
  workload = workloads.WORKLOADS[model]()
  batch = workload.make_batch(np.random.default_rng(0), batch_size)
  if name in steps(workload.loss_fn):
    jax.block_until_ready(jnp.ones(8) + 1)
    before = memory_megabytes("VmRSS")
    step = steps(workload.loss_fn)[name]
    state = step.init(jax.jit(workload.init)(jax.random.key(0)))
    state = jax.tree.map(jnp.copy, state)
    update = jax.jit(step.update, donate_argnums=0)
    update = update.lower(state, batch).compile()

    def call():
      nonlocal state
      state, reported = update(state, batch)
      jax.block_until_ready((state, reported))
  else:
    import torch_peers

    before = memory_megabytes("VmRSS")
    call = torch_peers.make_step(model, name, batch)
  with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # Forget the peak so far, of the compiler.
  for _ in range(3):
    call()
  print(memory_megabytes("VmHWM") - before)


def memory_megabytes(field: str) -> float:
  """Of this process, by Linux: ``VmRSS`` now or ``VmHWM`` at its peak."""
  with open("/proc/self/status") as file:
    (line,) = (line for line in file if line.startswith(f"{field}:"))
  return int(line.split()[1]) / 1024


def main():
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    "--models", nargs="+", choices=workloads.WORKLOADS, default=["mlp"]
  )
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 256])
  parser.add_argument(
    "--rounds", type=int, default=40, help="interleaved timings of each step"
  )
  parser.add_argument(
    "--peers",
    action="store_true",
    help="the steps that have a like in PyTorch, and those",
  )
  parser.add_argument(
    "--peak",
    action="store_true",
    help="also the peak memory of each step, in a process of its own",
  )
  parser.add_argument("--output", help="also write the rows to this JSON file")
  parser.add_argument("--peak-of", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if min(args.batch_sizes) < 1 or args.rounds < 1:
    parser.error("--batch-sizes and --rounds must be positive")
  if args.peak_of:
    print_peak(args.models[0], args.batch_sizes[0], args.peak_of)
    return
  versions = {"jax": jax.__version__, "optax": optax.__version__}
  make_others = lambda model, batch_size: {}
  if args.peers:
    try:
      import torch
      import torch_peers
    except ImportError as error:
      parser.error(
        f"--peers needs {error.name}. Run: pip install torch pytorch_optimizer"
      )
    versions["torch"] = torch.__version__

    def make_others(model, batch_size):
      batch = workloads.WORKLOADS[model]().make_batch(
        np.random.default_rng(0), batch_size
      )
      return {
        name: torch_peers.make_step(model, name, batch)
        for name in torch_peers.OPTIMIZERS
      }

  device = jax.devices()[0].device_kind
  print(
    f"{device}, {os.cpu_count()} cores, {platform.machine()}, "
    + ", ".join(f"{name} {version}" for name, version in versions.items())
  )
  print(
    f"{'model':11} {'batch':>5} {'step':38} {'words':>6} {'above':>6} "
    f"{'temp':>5} {'ms':>8} {'/floor':>6} {'/SGD':>6}"
    + ("  peak MB" if args.peak else "")
  )
  rows = []
  for model in args.models:
    for batch_size in args.batch_sizes:
      found = measure(
        workloads.WORKLOADS[model](),
        batch_size,
        args.rounds,
        PEERED if args.peers else (),
        make_others(model, batch_size),
      )
      for row in found:
        row["model"] = model
        line = f"{model:11} {batch_size:5} {row['step']:38}"
        if "words" in row:
          line += (
            f" {row['words']:6.2f} {row['words_above_floor']:6.2f} "
            f"{row['temporary_words']:5.2f}"
          )
        else:
          line += " " * 20
        line += f" {row['milliseconds']:8.2f}"
        line += (
          f" {row['ratio_to_floor']:6.3f}"
          if "ratio_to_floor" in row
          else " " * 7
        )
        line += f" {row['ratio_to_sgd']:6.3f}"
        if args.peak:
          row["peak_megabytes"] = peak_megabytes(model, batch_size, row["step"])
          line += f" {row['peak_megabytes']:8.0f}"
        print(line, flush=True)
      rows += found
  if args.output:
    with open(args.output, "w") as file:
      json.dump(
        {"device": device, "versions": versions, "rows": rows}, file, indent=2
      )


if __name__ == "__main__":
  main()

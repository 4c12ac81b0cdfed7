"""What a step of F-SAM costs, against plain SGD and against the floor.

The floor is what no sharpness-aware step can undercut: two dependent gradients
and one optimizer update, with no norm and no moving average. XLA counts the
bytes that the compiled step reads and writes and the temporary memory it
allocates; both are printed in words (4 bytes) a parameter. Times are medians of
interleaved runs, given as ratios to the floor's of the same round.

  python benchmarks/step_cost.py [--batch-sizes 8 256] [--rounds 40]
                                 [--output step_cost.json]
"""

import argparse
import itertools
import json
import os
import platform
import time
from typing import Any, Callable, NamedTuple

import jax
from jax import numpy as jnp
import numpy as np
import optax

import fsam_optax

LAYERS = (784, 1408, 1264, 10)  # 2.9 million parameters.
RHO = 0.05


class Step(NamedTuple):
  """A step to measure: its initial state from parameters, and its function."""

  init: Callable[[Any], Any]
  update: Callable[[Any, Any], Any]


def init_params(key: jax.Array) -> dict[str, dict[str, jax.Array]]:
  """He-initialised weights of the multilayer perceptron."""
  params = {}
  for i, (fan_in, fan_out) in enumerate(itertools.pairwise(LAYERS)):
    key, layer_key = jax.random.split(key)
    kernel = jax.random.normal(layer_key, (fan_in, fan_out))
    params[f"layer_{i}"] = {
      "kernel": kernel * (2 / fan_in) ** 0.5,
      "bias": jnp.zeros(fan_out),
    }
  return params


def loss_fn(params, batch):
  """Mean softmax cross-entropy of the perceptron on a batch."""
  inputs, labels = batch
  *hidden, output = params.values()
  for layer in hidden:
    inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"])
  logits = inputs @ output["kernel"] + output["bias"]
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def steps() -> dict[str, Step]:
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
    "fsam in a chain": Step(with_opt_state(chain), fsam_chain),
    "train step, metrics=(), no skip": train_step(
      metrics=(), skip_nonfinite=False
    ),
    "train step, no skip": train_step(skip_nonfinite=False),
    "train step, metrics=()": train_step(metrics=()),
    "train step (default)": train_step(),
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


def measure(batch_size: int, rounds: int) -> list[dict[str, Any]]:
  """Compiles every step and times them in turn, a row a step."""
  keys = jax.random.split(jax.random.key(0), 3)
  batch = (
    jax.random.normal(keys[0], (batch_size, LAYERS[0])),
    jax.random.randint(keys[1], (batch_size,), 0, LAYERS[-1]),
  )
  num_params = sum(
    x.size
    for x in jax.tree.leaves(jax.eval_shape(init_params, jax.random.key(0)))
  )
  word = 4 * num_params
  compiled, states, rows = {}, {}, []
  for name, step in steps().items():
    states[name] = step.init(init_params(keys[2]))
    start = time.perf_counter()
    compiled[name] = (
      jax.jit(step.update, donate_argnums=0)
      .lower(states[name], batch)
      .compile()
    )
    rows.append(
      {
        "step": name,
        "batch_size": batch_size,
        "words": compiled[name].cost_analysis()["bytes accessed"] / word,
        "temporary_words": compiled[name].memory_analysis().temp_size_in_bytes
        / word,
        "flops": compiled[name].cost_analysis()["flops"],
        "compile_seconds": time.perf_counter() - start,
      }
    )
  repeats = 8 if batch_size <= 32 else 3
  seconds = {name: [] for name in compiled}
  for _ in range(rounds + 1):
    for name, step in compiled.items():
      start = time.perf_counter()
      for _ in range(repeats):
        states[name], reported = step(states[name], batch)
      jax.block_until_ready((states[name], reported))
      seconds[name].append((time.perf_counter() - start) / repeats)
  # The first round warms up.
  seconds = {name: np.array(times[1:]) for name, times in seconds.items()}
  floor = next(row for row in rows if row["step"] == "floor")
  for row in rows:
    times = seconds[row["step"]]
    row["milliseconds"] = float(np.median(times)) * 1e3
    row["ratio_to_floor"] = float(np.median(times / seconds["floor"]))
    row["ratio_to_sgd"] = float(np.median(times / seconds["SGD"]))
    row["words_above_floor"] = row["words"] - floor["words"]
  return rows


def main():
  """Measures and prints the table."""
  parser = argparse.ArgumentParser(
    description=__doc__.split("\n", 1)[0],
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 256])
  parser.add_argument(
    "--rounds", type=int, default=40, help="interleaved timings of each step"
  )
  parser.add_argument("--output", help="also write the rows to this JSON file")
  args = parser.parse_args()
  if min(args.batch_sizes) < 1 or args.rounds < 1:
    parser.error("--batch-sizes and --rounds must be positive")
  rows = []
  for batch_size in args.batch_sizes:
    rows += measure(batch_size, args.rounds)
  device = jax.devices()[0].device_kind
  print(
    f"{device}, {os.cpu_count()} cores, {platform.machine()}, "
    f"jax {jax.__version__}, optax {optax.__version__}"
  )
  print(
    f"{'batch':>5} {'step':32} {'words':>6} {'above':>6} {'temp':>5} "
    f"{'ms':>7} {'/floor':>6} {'/SGD':>6}"
  )
  for row in rows:
    print(
      f"{row['batch_size']:5} {row['step']:32} {row['words']:6.2f} "
      f"{row['words_above_floor']:6.2f} {row['temporary_words']:5.2f} "
      f"{row['milliseconds']:7.2f} {row['ratio_to_floor']:6.3f} "
      f"{row['ratio_to_sgd']:6.3f}"
    )
  if args.output:
    with open(args.output, "w") as file:
      json.dump({"device": device, "rows": rows}, file, indent=2)


if __name__ == "__main__":
  main()

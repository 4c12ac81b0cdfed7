"""Tables of measurements, from the files that hold the measurements.

The tables by name:

- ``study NAME INDEX``: a table of ``docs/studies/NAME.json``, or of
  ``docs/compare.json``;
- ``multiples``, ``costs``, ``gpu``, ``roofline``, ``tpu``, ``cpu``, ``peers``,
  ``scaling``, ``pods``, ``pods-gpu`` and ``train``: ``docs/measurements``.
"""

from collections.abc import Collection
import functools
import json
import pathlib

from fsam_optax.experiments.common import tables

DOCS = pathlib.Path(__file__).parents[1]
FOLDERS = (DOCS, DOCS / "studies", DOCS / "measurements")


@functools.cache
def _read(name: str):
  text = (DOCS / name).read_text(encoding="utf-8")
  if name.endswith(".jsonl"):
    return [json.loads(line) for line in text.splitlines()]
  return json.loads(text)


def study(name: str, index: str = "0"):
  """A table of a study, or of `compare`, as it wrote it."""
  table = _studied(name, index)
  rows = [[tables.shown(cell) for cell in row] for row in table["rows"]]
  return table["header"], rows


def _studied(name: str, index: str = "0"):
  file = "compare.json" if name == "compare" else f"studies/{name}.json"
  return _read(file)["tables"][int(index)]


_STEPS = {  # By the name in the file.
  "SAM by hand": "SAM by hand",
  "optax.contrib.sam": "optax.contrib.sam",
  "F-SAM by hand": "F-SAM by hand, without guards",
  "fsam in a chain": "`fsam` in a chain",
  "train step, no skip": "train step, `skip_nonfinite=False`",
  "train step (default)": "train step, default",
  "train step, all metrics": "with all `metrics=`",
  "train step, average of the descent": '`ema_gradient="descent"`',
  "train step, momentum as the average": '`average="optimizer"`',
  "train step, paper order": '`order="paper"`',
  "train step, adaptive": "`adaptive=True`",
  "train step, bfloat16 average": "bfloat16 average",
  "train step, 1/8": "`ascent_fraction=1/8`",
  "train step, 1/8, average of the descent": (
    '`ascent_fraction=1/8, ema_gradient="descent"`'
  ),
  "train step, SAM": "`sam_perturbation`",
  "train step, 4 micro-batches": "4 micro-batches",
  "train step, every 2nd": "`every=2` in one graph",
  "train step, gate shut": "its one-pass step, where the host picks",
}


def _step_costs(name: str):
  """The rows of `benchmarks/step_cost.py` by model, rows and step."""
  return {
    (row["model"], row["batch_size"], row["step"]): row
    for row in _read(f"measurements/{name}.json")["rows"]
  }


_CHOICES = (  # The steps that users choose between.
  "optax.contrib.sam",
  "fsam in a chain",
  "train step (default)",
  "train step, 1/8, average of the descent",
)
_TABLED = (*_CHOICES, "train step, momentum as the average")
_ON_DEVICES = {  # The file, what is counted there, and on what.
  "GPU": ("step_cost_gpu", "main_memory_above_floor", ("perceptron", 128)),
  "TPU": ("step_cost_tpu", "words_above_floor", ("perceptron", 128)),
  "CPU": ("step_cost", "words_above_floor", ("mlp", 8)),
}


def multiples():
  """What a step takes, over plain SGD's, and the copies of the model."""
  cpu_rows, gpu_rows = _step_costs("step_cost"), _step_costs("step_cost_gpu")
  tpu_rows = _step_costs("step_cost_tpu")

  def bytes_over_sgd(rows, model, step):
    size = lambda name: rows[model, 128, name]["main_memory_words"]
    return f"{size(step) / size('SGD'):.2f}"

  def copies(row):
    return f"{row['state_words'] + row['temporary_words']:.1f}"

  header = ["step", "time, CPU", "bytes, GPU: ResNet-18", "perceptron"]
  return [*header, "bytes, TPU: perceptron", "copies of the model"], [
    [
      _STEPS[step],
      f"{cpu_rows['mlp', 256, step]['ratio_to_sgd']:.2f}",
      bytes_over_sgd(gpu_rows, "resnet18", step),
      bytes_over_sgd(gpu_rows, "perceptron", step),
      bytes_over_sgd(tpu_rows, "perceptron", step),
      copies(gpu_rows["perceptron", 128, step]),
    ]
    for step in _TABLED
  ]


def costs():
  """Words and memory above the floor, on each kind of device."""
  header, rows = ["step"], [[_STEPS[step]] for step in _TABLED]
  for device, (file, count, key) in _ON_DEVICES.items():
    header += [f"{device}: words", "trees"]
    found = _step_costs(file)
    for row, step in zip(rows, _TABLED, strict=True):
      counts = found[(*key, step)]
      trees = round(counts["temporary_above_floor"], 1) + 0.0  # Never -0.0.
      row += [f"{counts[count]:.1f}", f"{trees:.1f}"]
  return header, rows


def _on_device(file: str, counts: dict[str, tuple[str, str, int]]):
  """What a step moves above the floor, by the count of a compiler.

  Args:
    file: of `benchmarks/step_cost.py`.
    counts: by the title of a column, a model, a field and its digits.

  Returns:
    The header and the rows.
  """
  found = _step_costs(file)

  def cell(step, model, field, digits):
    row = found.get((model, 128, step))
    return "" if row is None else f"{row[field]:.{digits}f}"

  return ["step", *counts], [
    [name, *(cell(step, *count) for count in counts.values())]
    for step, name in _STEPS.items()
  ]


def tpu():
  """What a step moves above the floor, by the count of the TPU's compiler."""
  counts = {
    "perceptron: words": ("perceptron", "words_above_floor", 1),
    "temporary trees": ("perceptron", "temporary_above_floor", 2),
    "ResNet-18: words": ("resnet18", "words_above_floor", 1),
    "of these, main memory": ("resnet18", "main_memory_above_floor", 1),
  }
  return _on_device("step_cost_tpu", counts)


def gpu():
  """What a step moves above the floor, by the count of the GPU's compiler."""
  counts = {
    f"{name}: {title}": (model, field, digits)
    for model, name in _ON_GPU.items()
    for title, field, digits in (
      ("words", "main_memory_above_floor", 1),
      ("trees", "temporary_above_floor", 2),
    )
  }
  return _on_device("step_cost_gpu", counts)


_ON_GPU = {
  "perceptron": "perceptron",
  "decoder": "transformer",
  "resnet18": "ResNet-18",
}


def roofline():
  """The time of a step over SGD's that a roofline of an H100 predicts."""
  found = _step_costs("step_cost_gpu")
  names = {
    **_ON_GPU,
    **{f"{model}-bfloat16": f"{x}, bfloat16" for model, x in _ON_GPU.items()},
  }
  settings = [
    (model, size)
    for model in names
    for size in (128, 1024)
    if (model, size, "SGD") in found
  ]
  steps = ("floor", "SAM by hand", *_CHOICES[1:])
  kinds = {
    "predicted_ratio_to_sgd": "",
    "predicted_ratio_in_float32": ", float32",
  }
  rows = []
  for field, kind in kinds.items():
    for model, size in settings:
      ratios = [found[model, size, step].get(field) for step in steps]
      if all(ratios):
        name = f"{names[model]}, {size}{kind}"
        rows.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
  titles = ("two gradients" if x == "floor" else _STEPS[x] for x in steps)
  return ["model and rows", *titles], rows


def cpu():
  """What a step moves and how long it takes, above the floor."""
  found = _step_costs("step_cost")
  floor = found["mlp", 8, "floor"]["temporary_words"]
  rows = []
  for step, name in {"SGD": "SGD", **_STEPS}.items():
    small, large = (found["mlp", size, step] for size in (8, 256))
    words = small["words_above_floor"], small["temporary_words"]
    times = (x.get("ratio_to_floor") for x in (large, small))
    row = [name, *(f"{x:.1f}" for x in words)]
    rows.append(row + ["" if x is None else f"{x:.2f}" for x in times])
  header = ["step", "words above the floor"]
  header.append(f"temporary words (floor: {floor:.1f})")
  return [*header, "time over the floor, batch 256", "batch 8"], rows


_PEERS = {  # By the name in the file.
  "SGD": "JAX: SGD",
  "floor": "floor",
  "optax.contrib.sam": "optax.contrib.sam, opaque",
  "optax.contrib.sam, transparent": "optax.contrib.sam, transparent",
  "fsam in a chain": "`fsam` in a chain",
  "train step (default)": "train step, default",
  "train step, 1/8": "train step, `ascent_fraction=1/8`",
  "torch SGD": "PyTorch: SGD",
  "pytorch_optimizer SAM": "pytorch_optimizer SAM",
  "pytorch_optimizer FriendlySAM": "pytorch_optimizer FriendlySAM",
  "pytorch_optimizer FriendlySAM, foreach": "the same, `foreach=True`",
}


def peers():
  """Times over SGD's of the same framework, and milliseconds."""
  found = _step_costs("peers")
  settings = list(dict.fromkeys(key[:2] for key in found))
  rows = []
  for step, name in _PEERS.items():
    times = [found[(*setting, step)] for setting in settings]
    rows.append(
      [name]
      + [f"{x['ratio_to_sgd']:.2f} ({x['milliseconds']:.3g})" for x in times]
    )
  return ["step", *(f"{model} {size}" for model, size in settings)], rows


def scaling():
  """How the times grow, a row a point."""
  points = {}
  for row in _read("measurements/scaling.json")["rows"]:
    points.setdefault((row["grows"], row["size"]), {})[row["step"]] = row
  chain, default = "fsam in a chain", "train step (default)"
  rows = []
  for (grows, size), found in points.items():
    times = [
      f"{found[step]['ratio_to_floor']:.2f}"
      for step in (chain, default, "optax.contrib.sam")
    ]
    compiling = ", ".join(
      f"{found[step]['compile_seconds']:.1f}"
      for step in ("floor", chain, default)
    )
    floor = f"{found['floor']['milliseconds']:.3g}"
    rows.append([grows, f"{size:,}", floor, *times, compiling])
  header = ["grows", "to", "floor, ms", _STEPS[chain], _STEPS[default]]
  header.append("optax.contrib.sam")
  return [*header, "seconds to compile: floor, chain, default"], rows


_MODES = {  # By the name in the file.
  "SGD": "SGD",
  "default": "default",
  "average-of-descent": '`ema_gradient="descent"`',
  "local": "local, `sync_perturbation=False`",
  "lean": "lean, both",
  "ascent-fraction": "`ascent_fraction=1/4`",
  "micro-batches": "`num_microbatches=4`",
  "jit-SGD": "SGD under plain jit",
  "jit": "default under plain jit",
  "fsdp-SGD": "SGD by FSDP",
  "fsdp": "FSDP, on two axes",
}


def pods():
  """What the compiler counts for one chip of a pod, as it was printed."""
  found = {row["mode"]: row for row in _read("measurements/pods.jsonl")}
  rows = []
  for mode, name in _MODES.items():
    if mode not in found:
      continue
    row = found[mode]
    reduced, others = row["words"].values()
    words = f"{reduced:.2f}"
    if others:
      words += f", and {others:.2f} gathered or scattered"
    between = str(row["between"])
    if row["between"]:
      between += f" ({row['words_between']:.2f} words)"
    flops = str(row["gflop"]) + "†" * (mode == "micro-batches")
    state = str(row["state_mebibytes"])
    rows.append([name, words, str(row["collectives"]), between, flops, state])
  header = ["mode", "all-reduced words a parameter", "collectives"]
  return [*header, "between the passes", "GFLOP", "MiB of state"], rows


def pods_gpu():
  """What the compiler counts for one GPU of many."""
  rows = []
  for row in _read("measurements/pods_gpu.jsonl"):
    words = dict(row["words"])
    reduced = words.pop("all-reduce", 0)
    between = str(row["between"])
    if row["between"]:
      between += f" ({row['words_between']:.2f} words)"
    rows.append(
      [
        _MODES[row["mode"]],
        *(f"{reduced:.2f}", f"{sum(words.values()):.2f}"),
        *(str(row["collectives"]), between),
        f"{row['temporary_bytes'] / 2**20:.0f}",
        f"{row['state_bytes'] / 2**20:.2f}",
      ]
    )
  header = ["mode", "all-reduced words a parameter", "gathered or scattered"]
  header += ["collectives", "between the passes", "temporary MiB"]
  return [*header, "MiB of state"], rows


_TRAINED = {  # By the flags in the file.
  "--optimizer sgd": "SGD",
  "--optimizer sam": "SAM",
  "--optimizer fsam": "F-SAM",
  "--optimizer fsam --ascent-fraction 0.125 --ema-gradient descent": (
    "F-SAM, 1/8 of the rows, `--ema-gradient descent`"
  ),
  "--optimizer sgd --dtype bfloat16": "SGD, bfloat16",
  "--optimizer fsam --dtype bfloat16": "F-SAM, bfloat16",
}


def train():
  """What the compiler counts in a step of `train` on one chip."""
  found = {row["flags"]: row for row in _read("measurements/train_step.jsonl")}
  return (
    ["step", "GFLOP", "GiB accessed", "temporary MiB", "MiB of state"],
    [
      [
        name,
        f"{found[flags]['flops'] / 1e9:.0f}",
        f"{found[flags]['bytes'] / 2**30:.1f}",
        f"{found[flags]['temporary_bytes'] / 2**20:.0f}",
        f"{found[flags]['state_bytes'] / 2**20:.1f}",
      ]
      for flags, name in _TRAINED.items()
    ],
  )


TABLES = {
  "study": study,
  "costs": costs,
  "multiples": multiples,
  "gpu": gpu,
  "roofline": roofline,
  "tpu": tpu,
  "cpu": cpu,
  "peers": peers,
  "scaling": scaling,
  "pods": pods,
  "pods-gpu": pods_gpu,
  "train": train,
}


def note(table: str) -> str:
  """What a study says below the title of a table, or nothing."""
  name, *arguments = table.split()
  return _studied(*arguments).get("note", "") if name == "study" else ""


def markdown(table: str, without: Collection[str] = ()) -> list[str]:
  """The lines of a table, by its name and arguments, without some columns."""
  name, *arguments = table.split()
  header, rows = TABLES[name](*arguments)
  keep = [i for i, title in enumerate(header) if title not in without]
  line = lambda cells: "| " + " | ".join(cells[i] or " " for i in keep) + " |"
  return [line(header), "|" + "---|" * len(keep), *map(line, rows)]

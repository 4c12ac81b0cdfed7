"""Tables of measurements, from the files that hold the measurements.

No number is typed into a page. The tables by name:

- ``study NAME INDEX``: a table of ``docs/studies/NAME.json``;
- ``ema``: the averages of the study ``ema``, a row a decay;
- ``pareto``, ``pareto-cnn`` and ``pareto-rule``: ``docs/pareto.jsonl``;
- ``tpu``: ``docs/step_cost_tpu.json``.
"""

import functools
import json
import pathlib

import numpy as np

DOCS = pathlib.Path(__file__).parents[1]


@functools.cache
def _read(name: str):
  text = (DOCS / name).read_text(encoding="utf-8")
  if name.endswith(".jsonl"):
    return [json.loads(line) for line in text.splitlines()]
  return json.loads(text)


def study(name: str, index: str = "0"):
  """A table of a study as the study wrote it."""
  table = _read(f"studies/{name}.json")["tables"][int(index)]
  rows = [[cell.replace(", p ", ", p = ") for cell in r] for r in table["rows"]]
  return table["header"], rows


def ema():
  """The study `ema`, a row a decay."""
  header, rows = study("ema")
  found = {
    (row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows
  }
  mean = lambda cell: cell.split(" ±")[0]
  return (
    ["lmbda", "i.i.d.: variance / batch's", "(1 - l) / (1 + l)", "epoch-wise"]
    + [f"squared error at rate {rate}" for rate in ("0.003", "0.01", "0.03")]
    + ["cosine at 0.01"],
    [
      [
        lmbda,
        mean(found["i.i.d., 0.01", lmbda]["variance / batch's"]),
        found["i.i.d., 0.01", lmbda]["(1 - l) / (1 + l)"],
        mean(found["epoch-wise, 0.01", lmbda]["variance / batch's"]),
        *(
          mean(found[f"epoch-wise, {rate}", lmbda]["squared error"])
          for rate in ("0.003", "0.01", "0.03")
        ),
        mean(found["epoch-wise, 0.01", lmbda]["cosine"]),
      ]
      for lmbda in dict.fromkeys(row[1] for row in rows)
    ],
  )


_FORMS = {  # By the name of the arm, in the order of the gradients they take.
  "SGD": "SGD",
  "SGD, twice the epochs": "SGD, twice the epochs",
  "random direction": "random direction (control)",
  "F-SAM, previous descent gradient": "F-SAM, direction of the step before",
  "F-SAM, 1/16": "F-SAM, `ascent_fraction=1/16`",
  "F-SAM, 1/8, every 2nd step": "F-SAM, 1/8 and `every=2`",
  "SAM, 1/8": "SAM, 1/8",
  "F-SAM, 1/8": "F-SAM, 1/8",
  "F-SAM, 1/8, descent average": '**F-SAM, 1/8, `ema_gradient="descent"`**',
  "F-SAM, 1/4": "F-SAM, 1/4",
  "F-SAM, 1/2": "F-SAM, 1/2",
  "F-SAM, every 2nd step": "F-SAM, `every=2`",
  "F-SAM, perturbation held for 2 steps": (
    "F-SAM, perturbation held for 2 steps"
  ),
  "SAM, two gradients at once": "SAM, two gradients at once (SAMPa)",
  "F-SAM, two gradients at once": "F-SAM, two gradients at once",
  "SAM": "SAM",
  "F-SAM": "F-SAM",
}


def _pareto(model: str, datasets: list[str], forms: dict[str, str], times):
  """Accuracy of F-SAM, and of the other forms minus its own, by setting."""
  found = {
    (row["dataset"], row["label_noise"], row["arm"]): row
    for row in _read("pareto.jsonl")
    if row["model"] == model
  }
  settings = [(d, noise) for d in datasets for noise in (0.0, 0.2, 0.4, 0.6)]
  rows = []
  for arm, form in forms.items():
    gradients = found[(*settings[0], arm)]["gradients"]
    row = [form, f"{gradients:g}"]
    if times:
      row.append(", ".join(f"{x:.2f}" for x in times[arm]))
    for setting in settings:
      values = np.array(found[(*setting, arm)]["test_accuracy"])
      if arm != "F-SAM":
        values = values - found[(*setting, "F-SAM")]["test_accuracy"]
      sign = "" if arm == "F-SAM" else "+"
      error = values.std(ddof=1) / len(values) ** 0.5
      row.append(f"{values.mean():{sign}.2f} ± {error:.2f}")
    rows.append(row)
  header = ["form", "gradients", *(["time, mlp, cnn"] if times else [])]
  return header + [
    f"{d} {noise:.0%}".replace("%", " %") for d, noise in settings
  ], rows


def pareto():
  """All forms on the perceptron."""
  times = _read("pareto_times.json")
  return _pareto("mlp", ["mnist", "digits"], _FORMS, times)


def pareto_cnn():
  """The forms that matter, on the small convolutional network."""
  arms = {row["arm"] for row in _read("pareto.jsonl") if row["model"] == "cnn"}
  forms = {arm: form for arm, form in _FORMS.items() if arm in arms}
  return _pareto("cnn", ["digits"], forms, None)


def pareto_rule():
  """Fractions at the radius that the rule gives."""
  forms = {
    f"F-SAM, {fraction}, descent average, rho by the rule": fraction
    for fraction in ("1/2", "1/4", "1/8", "1/16")
  }
  return _pareto("mlp", ["mnist", "digits"], forms, None)


_STEPS = {  # By the name in the file.
  "SAM by hand": "SAM by hand",
  "F-SAM by hand": "F-SAM by hand, without guards",
  "fsam in a chain": "`fsam` in a chain",
  "train step, no skip": "train step, `skip_nonfinite=False`",
  "train step (default)": "train step, default",
  "train step, all metrics": "with all `metrics=`",
  "train step, average of the descent": '`ema_gradient="descent"`',
  "train step, paper order": '`order="paper"`',
  "train step, adaptive": "`adaptive=True`",
  "train step, bfloat16 average": "bfloat16 average",
  "train step, 1/8": "`ascent_fraction=1/8`",
  "train step, SAM": "`sam_perturbation`",
  "train step, 4 micro-batches": "4 micro-batches",
  "train step, every 2nd": "`every=2` in one graph",
  "train step, gate shut": "its one-pass step, where the host picks",
}


def tpu():
  """What a step moves above the floor, by the count of the TPU's compiler."""
  found = {
    (row["model"], row["step"]): row
    for row in _read("step_cost_tpu.json")["rows"]
  }

  def cell(model, step, what, digits):
    row = found.get((model, step))
    return "" if row is None else f"{row[what]:.{digits}f}"

  columns = "perceptron: words", "temporary trees", "ResNet-18: words"
  return (
    ["step", *columns, "of these, main memory"],
    [
      [
        name,
        cell("perceptron", step, "words_above_floor", 1),
        cell("perceptron", step, "temporary_above_floor", 2),
        cell("resnet18", step, "words_above_floor", 1),
        cell("resnet18", step, "main_memory_above_floor", 1),
      ]
      for step, name in _STEPS.items()
    ],
  )


TABLES = {
  "study": study,
  "ema": ema,
  "pareto": pareto,
  "pareto-cnn": pareto_cnn,
  "pareto-rule": pareto_rule,
  "tpu": tpu,
}

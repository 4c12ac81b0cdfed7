"""The cheap forms, against NumPy on a quadratic, and their tables."""

import json
import pathlib

from jax import numpy as jnp
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax.experiments.studies import cheap_forms

RATE, RHO = 0.1, 0.05
SCALES = np.array([1.0, 3.0, 0.5])
TARGETS = np.random.default_rng(0).normal(size=(12, 3))


def loss_fn(params, model_state, batch, rng):
  del rng
  target = batch["x"] if isinstance(batch, dict) else batch
  loss = 0.5 * jnp.sum(jnp.asarray(SCALES) * (params["w"] - target) ** 2)
  return loss, (model_state, {})


def gradient(w, target):
  return SCALES * (w - target)


def trained(name):
  """The weights of each step, and the last state."""
  arm = cheap_forms.ARMS[name]
  state = fsam_optax.TrainState.create(
    apply_fn=None,
    params={"w": jnp.ones(3)},
    tx=optax.sgd(RATE),
    perturbation=arm.perturbation(RHO),
  )
  step = arm.step(loss_fn, steps=100)
  weights = []
  for target in TARGETS:
    batch = jnp.asarray(target)
    state, _ = step(
      state, {"x": batch, "rate": RATE} if arm.sees_more else batch
    )
    weights.append(np.asarray(state.params["w"]))
  return np.array(weights), state


def test_along_the_momentum_it_ascends_by_gradients_of_before(x64):
  """MSAM: along the sum that SGD's momentum is, which costs no gradient."""
  del x64
  w, trace, expected = np.ones(3), np.zeros(3), []
  for target in TARGETS:
    norm = np.linalg.norm(trace)
    perturbed = w + (RHO * trace / norm if norm else 0)
    g = gradient(perturbed, target)
    trace = 0.9 * trace + g
    w = w - RATE * g
    expected.append(w)
  found, _ = trained("along the momentum")
  np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["SAM", "F-SAM"])
def test_the_gate_opens_where_the_gradient_is_longer_than_before(name, x64):
  del x64
  w, mean, average, ascents, expected = np.ones(3), None, None, 0, []
  for target in TARGETS:
    g = gradient(w, target)
    square = g @ g
    mean = square if mean is None else mean
    direction = g
    if name == "F-SAM" and average is not None:
      direction = g - average
    average = g if average is None else 0.9 * average + 0.1 * g
    if square > mean:
      ascents += 1
      g = gradient(w + RHO * direction / np.linalg.norm(direction), target)
    mean = 0.9 * mean + 0.1 * square
    w = w - RATE * g
    expected.append(w)
  assert 2 < ascents < len(TARGETS) - 2
  found, state = trained(f"{name}, at long gradients")
  np.testing.assert_allclose(found, expected, rtol=1e-10)
  assert state.perturbation_state.memory[1] == ascents
  assert state.perturbation_state.count == len(TARGETS)


def test_two_gradients_at_once_wait_for_none_of_each_other(x64):
  """SAMPa: both points follow from the last auxiliary gradient."""
  del x64
  w, last, expected = np.ones(3), np.zeros(3), []
  for target in TARGETS:
    norm = np.linalg.norm(last)
    perturbed = w + (RHO * last / norm if norm else 0)
    auxiliary = gradient(w - RATE * last, target)
    w = w - RATE * (0.2 * auxiliary + 0.8 * gradient(perturbed, target))
    last = auxiliary
    expected.append(w)
  found, _ = trained("SAM, two gradients at once")
  np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.parametrize("percent", [10, 20, 30])
def test_late_forms_ascend_at_the_end_alone(percent):
  arm = cheap_forms.ARMS[f"F-SAM, last {percent} %"]
  assert arm.gradients == 1 + arm.last == pytest.approx(1 + percent / 100)
  seen = {}

  def make_step(loss_fn, **options):
    del loss_fn
    seen.update(options)

  arm._replace(make_step=make_step).step(loss_fn, steps=160)
  assert seen["start"] == pytest.approx((1 - percent / 100) * 160, abs=0.5)


def test_every_form_has_its_gradients_counted():
  """At most those of F-SAM, at least one; a late form the fraction more."""
  for name, arm in cheap_forms.ARMS.items():
    assert 1 <= arm.gradients <= 2, name
    fraction = arm.options.get("ascent_fraction", 1)
    every = arm.options.get("every", 1)
    if arm.options.keys() & {"ascent_fraction", "every"}:
      assert arm.gradients == 1 + fraction / every, name


DOCS = pathlib.Path(__file__).parents[3] / "docs" / "studies"


def test_the_published_rows_give_the_published_tables():
  """And have what `study cheap-forms` looks for, so that none is trained."""
  lines = (DOCS / "cheap-forms.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  published = json.loads((DOCS / "cheap-forms.json").read_text())
  found = json.loads(json.dumps(cheap_forms.report(rows)))
  for table, expected in zip(found["tables"], published["tables"], strict=True):
    assert table.items() <= expected.items(), expected["title"]
  tested = {row["arm"] for row in rows if row["phase"] == "test"}
  assert tested <= cheap_forms.ARMS.keys() | cheap_forms.RULES.keys()


def test_an_exponent_costs_what_the_search_lost_by_it():
  """Between two radii of a search by eights, whose middle is the best."""

  def row(arm, noise, **rest):
    setting = {"dataset": "digits", "model": "mlp", "label_noise": noise}
    return {"arm": arm, "phase": "test", **setting, **rest} | {
      "learning_rate": 0.1,
      "weight_decay": 0.0,
      "test_accuracy": [1.0, 2.0],
      "gradients": 1,
    }

  def grid(*accuracies):
    return [
      [0.1, radius, 0.0, accuracy]
      for radius, accuracy in zip((0.1, 0.8, 6.4), accuracies, strict=True)
    ]

  rows = [
    row(cheap_forms.EIGHTH, 0.0, rho=0.8, grid=grid(80.0, 90.0, 70.0)),
    row("F-SAM", 0.0, rho=0.1),
    row(cheap_forms.EIGHTH, 0.6, rho=0.1, grid=grid(30.0, 20.0, 10.0)),
    row("F-SAM", 0.6, rho=0.1),
  ]
  (found,) = (
    table
    for table in cheap_forms.report(rows)["tables"]
    if table["title"] == "exponents of the rule"
  )
  assert found["header"] == ["exponent", "0 % wrong", "60 % wrong"]
  # At 0.1 * 8**e the first has climbed a part e of ten points, the second lost.
  assert found["rows"] == [
    [e, f"{10 * e - 10:.2f}", f"{0 - 10 * e:.2f}"]
    for e in (0, 0.1, 0.2, 0.3, 0.4)
  ]

"""The laboratory: what comes of runs, whoever trains beside them."""

import math

import jax
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax.experiments import networks
from fsam_optax.experiments.lab import arms
from fsam_optax.experiments.lab import laboratory
from fsam_optax.experiments.lab import search
from fsam_optax.experiments.lab import splits
from fsam_optax.experiments.lab import trainer as trainer_lib
from fsam_optax.experiments.lab.search import Point
from fsam_optax.experiments.networks.cnn import CNN

POINT = Point(0.05, 0.1, 0.0)


def laboratory_of(pool, **changes):
  return laboratory.Lab(
    **{
      "pool": pool,
      "model": "mlp",
      "network": networks.REGISTRY["mlp"].create,
      "label_noise": 0.2,
      "label_noise_kind": "symmetric",
      "epochs": 2,
      "batch_size": 100,
      "arms": {"SGD": arms.SGD, "F-SAM": arms.FSAM},
      "best": {"sgd": POINT, "fsam": POINT},
      "search_seeds": [0],
      "seeds": [10, 11, 12],
      "is_quick": True,
      **changes,
    }
  )


@pytest.fixture(name="pool", scope="module")
def fixture_pool():
  return splits.load("digits")


@pytest.fixture(name="lab", scope="module")
def fixture_lab(pool):
  return laboratory_of(pool)


def test_a_row_has_its_setting_and_is_the_same_whatever_runs_beside(lab):
  # Two at a time: the third seed is alone with a copy of the first.
  row = lab.run("F-SAM", POINT, [10, 11, 12], "a")
  assert row["input_shape"] == [8, 8, 1]
  assert row.items() >= {**lab.setting(), **POINT._asdict()}.items()
  assert len(set(row["test_accuracy"])) == 3
  again = lab.run("F-SAM", POINT, [12, 10], "b")
  for what in ("test_accuracy", "validation_accuracy"):
    assert again[what] == [row[what][2], row[what][0]]
  elsewhere = lab.at(label_noise=0.4)
  assert elsewhere.trainer is lab.trainer
  other = lab.at(arms={**lab.arms, "F-SAM": arms.SAM})
  assert other.trainer is not lab.trainer  # Another arm of the same name.
  noisy = elsewhere.run("F-SAM", POINT, [12, 10], "b")
  assert noisy["test_accuracy"] != again["test_accuracy"]


def test_the_best_point_is_tested_and_nothing_is_trained_twice(
  lab, monkeypatch
):
  row = lab.test("F-SAM")
  means = [mean for *_, mean in row["grid"]]
  best = row["grid"][int(np.argmax(means))]
  assert [row[x] for x in search.Point._fields] == best[:3]
  assert "rho" in row["on_edge"]  # Of two values, each is at an end.
  first = row["candidates"][0]
  assert first["test_accuracy"] == row["test_accuracy"]
  assert first["validation_accuracy"] == [max(means)]
  searched = [x for x in lab.store.rows if x["phase"] == "search"]
  assert len(searched) == len(means)
  assert not any("test_accuracy" in x for x in searched)
  monkeypatch.setattr(
    trainer_lib.Trainer, "__call__", lambda *_, **__: pytest.fail("it trained")
  )
  assert lab.test("F-SAM") is row


def test_a_diverged_run_leaves_a_gap(lab):
  point, measure = Point(1e30, 0.0, 0.0), lambda *_: pytest.fail("it measured")
  row = lab.run("SGD", point, lab.seeds, "a", measure=measure)
  assert row["diverged"] == 3
  assert row["test_accuracy"] == [None] * 3
  assert row["validation_accuracy"] == [0.0] * 3
  assert row["measures"] == {}


def test_a_measure_sees_the_rows_that_trained(lab):
  def measure(model, key):
    loss, params, rows = model
    run = int(jax.random.key_data(key)[1])
    drawn = lab.splits([10 + run])
    np.testing.assert_array_equal(rows["y"], drawn.train_labels[0])
    np.testing.assert_allclose(rows["x"].mean(), 0, atol=1e-4)
    return {"loss": float(loss(params, rows))}

  row = lab.run("SGD", POINT, lab.seeds, "measured", measure=measure)
  (losses,) = row["measures"].values()
  assert len(losses) == 3
  assert max(losses) < math.log(10)


def test_a_run_is_the_plain_loop(pool):
  """By `value_and_grad` by hand, statistics and mirrored rows included."""
  augment = lambda seed, step, x: x[:, :, ::-1] + 0 * (seed + step)
  network = lambda classes: CNN(classes, (4,), norm="batch")
  lab = laboratory_of(pool, network=network, epochs=1)
  outcomes = [
    lab.at(trainer_options={"augment": augment, "scan": scan}).trainer(
      "F-SAM", lab.splits([10]), *np.array([[0.05], [0.1], [0.5]])
    )
    for scan in (True, False)
  ]
  drawn = jax.tree.map(lambda x: x[0], lab.splits([10]))
  model = network(10)
  key, _ = jax.random.split(jax.random.key(10))
  variables = model.init(key, pool.x[:1])
  params, statistics = variables["params"], variables["batch_stats"]
  tx = optax.chain(
    optax.add_decayed_weights(0.5),
    optax.sgd(optax.cosine_decay_schedule(0.05, 8), momentum=0.9),
  )
  ascent = fsam_optax.friendly_perturbation(0.1)
  opt_state, ascent_state = tx.init(params), ascent.init(params)
  x = (pool.x - drawn.mean) / drawn.standard_deviation
  _, key = jax.random.split(jax.random.key(10))
  order = np.asarray(jax.random.permutation(jax.random.fold_in(key, 0), 800))

  def loss_fn(params, statistics, x, y):
    variables = {"params": params, "batch_stats": statistics}
    logits, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), new["batch_stats"]

  fn = jax.jit(fsam_optax.value_and_grad(loss_fn, ascent, has_aux=True))
  for at in order.reshape(8, 100):
    rows = x[drawn.train_rows[at]][:, :, ::-1], drawn.train_labels[at]
    (_, new), grads, ascent_state, _ = fn(
      params, ascent_state, statistics, *rows
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params, statistics = optax.apply_updates(params, updates), new
  variables = {"params": params, "batch_stats": statistics}
  logits = model.apply(variables, x[drawn.test_rows])
  hits = np.argmax(logits, -1) == pool.y[drawn.test_rows]
  expected = 100 * float(hits.mean())
  for outcome in outcomes:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a[0], b, atol=1e-4),
      outcome.params,
      params,
    )
    assert outcome.test_accuracy[0] == pytest.approx(expected, abs=0.3)
    assert not outcome.diverged.any()

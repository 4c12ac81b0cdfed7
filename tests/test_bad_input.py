"""Bad input: an error at trace time that names the argument and the remedy."""

import collections

import faces
from flax import nnx
from flax.training import train_state
import jax
from jax import numpy as jnp
from meshes import make_mesh
import numpy as np
import optax
import pytest

import fsam_optax
from fsam_optax import checkpoint
from fsam_optax import masks
from fsam_optax import sharding

W = {"w": jnp.ones(3)}
ALIKE = {"a/b": jnp.ones(2), "a": {"b": jnp.ones(3)}}
BATCH = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}


def loss(params, batch):
  return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def passes(
  loss_fn=loss, params=None, batch=None, perturbation=None, state=None, **kw
):
  """Traces the two passes on good input but for what the case changes."""
  params = W if params is None else params
  perturbation = perturbation or fsam_optax.friendly_perturbation()
  fn = fsam_optax.value_and_grad(loss_fn, perturbation, **kw)
  state = perturbation.init(params) if state is None else state
  jax.eval_shape(fn, params, state, BATCH if batch is None else batch)


def chain(params=W, tx=None, **kwargs):
  """Traces `update` of fsam in a chain."""
  tx = tx or optax.chain(fsam_optax.fsam(), optax.sgd(0.1))
  update = lambda grads, state: tx.update(grads, state, params, **kwargs)
  jax.eval_shape(update, grad_fn(W), tx.init(W))


def step(loss_fn=None, model_state=None, **options):
  """Traces a train step."""
  loss_fn = loss_fn or (lambda p, s, b, r: (loss(p, b), (s, {})))
  state = train_state_of(model_state=model_state)
  fn = fsam_optax.make_train_step(loss_fn, jit=False, **options)
  jax.eval_shape(fn, state, BATCH)


def step_of_replicas():
  loss_fn = lambda p, s, b, r: (loss(p, b), (s, {}))
  return fsam_optax.make_train_step(loss_fn, axis_name="batch", jit=False)


def masked_init(mask):
  fsam_optax.friendly_perturbation(mask=mask).init(W)


def nnx_fn(own=True, loss_fn=None, model=None, **options):
  """The passes of a model of `W`, of its optimizer or for a chain."""
  weights = faces.Weights(W)
  optimizer = fsam_optax.nnx.Optimizer(
    weights,
    optax.sgd(0.1),
    wrt=nnx.Param,
    perturbation=fsam_optax.friendly_perturbation(),
  )
  of = optimizer if own else fsam_optax.nnx
  loss_fn = loss_fn or (lambda m: loss(faces.weights_of(m), BATCH))
  return of.value_and_grad(loss_fn, **options)(model or weights)


def momentum_for_average(average="optimizer", **kwargs):
  return fsam_optax.friendly_perturbation(average=average, **kwargs)


def train_state_of(**fields):
  return faces.state_of(W, fsam_optax.friendly_perturbation(), **fields)


def batch_of(rows):
  return jax.tree.map(lambda x: jnp.ones((rows, *x.shape[1:])), BATCH)


grad_fn = jax.grad(lambda p: loss(p, BATCH))
radius = fsam_optax.radius_schedule

CASES = [
  # The batch.
  ("batch_of_unequal_lengths", ValueError, "`batch` must hold arrays of one",
   lambda: passes(batch={"x": jnp.ones((4, 3)), "y": jnp.ones(2)},
                  num_microbatches=2)),
  ("batch_with_a_scalar", ValueError, "`batch` must hold arrays of one",
   lambda: passes(batch={**BATCH, "t": 1.0}, num_microbatches=2)),
  ("empty_batch", ValueError, "`batch` must not be empty",
   lambda: passes(batch={"x": jnp.ones((0, 3)), "y": jnp.ones(0)})),
  ("batch_behind_a_key", ValueError, "may be a random key. It is the first arg",
   lambda: passes(batch=jax.random.PRNGKey(0), num_microbatches=2)),
  ("batch_behind_a_typed_key", ValueError, "may be a random key. It is the fir",
   lambda: passes(batch=jax.random.key(0), ascent_fraction=0.5)),
  ("ragged_micro_batches", ValueError, "for 4 rows. Drop 1 of them, or add 2",
   lambda: passes(num_microbatches=3)),
  # The parameters.
  ("bool_params", TypeError, r"`params` must hold floating-point.*\['w'\]",
   lambda: passes(params={"w": jnp.ones(3, bool)})),
  ("no_params", ValueError, "`params` must hold at least one",
   lambda: passes(params={})),
  ("state_of_other_params", ValueError, "`perturbation_state` must be that",
   lambda: passes(state=fsam_optax.friendly_perturbation().init(
     {"v": jnp.ones(3)}))),
  # The loss.
  ("vector_loss", TypeError, "`loss_fn` must return the loss as a real scalar",
   lambda: passes(lambda p, b: p["w"])),
  ("loss_without_promised_aux", TypeError, "`loss_fn` must return a pair",
   lambda: passes(has_aux=True)),
  ("aux_not_promised", TypeError, "`has_aux=True`",
   lambda: passes(lambda p, b: (loss(p, b), {}))),
  ("aux_of_rows_behind_a_gate", ValueError, r"float32\[2, 3\].*on all rows",
   lambda: passes(lambda p, b: (loss(p, b), b["x"]), has_aux=True, every=2,
                  ascent_fraction=0.5)),
  ("aux_of_rows_of_parts", TypeError, r"floating scalars.*\['out'\]",
   lambda: passes(lambda p, b: (loss(p, b), {"out": b["x"]}), has_aux=True,
                  num_microbatches=2)),
  # The train step's loss.
  ("step_loss_alone", TypeError, r"`loss_fn` must return \(loss, \(model_state",
   lambda: step(lambda p, s, b, r: loss(p, b))),
  ("step_metrics_not_a_dict", TypeError, "a dict of metrics",
   lambda: step(lambda p, s, b, r: (loss(p, b), (s, [])))),
  ("model_state_of_another_shape", ValueError,
   r"the model state in the [^\n]*float32\[2\] at mean, got float32\[3\]",
   lambda: step(lambda p, s, b, r: (loss(p, b), ({"mean": jnp.zeros(3)}, {})),
                model_state={"mean": jnp.zeros(2)})),
  ("metric_of_a_taken_name", ValueError, "must not report metrics under",
   lambda: step(lambda p, s, b, r: (loss(p, b), (s, {"loss": 0.0})))),
  ("unknown_metric", ValueError, "`metrics` must be",
   lambda: step(metrics=("norm",))),
  # The state of the train step.
  ("state_of_flax", TypeError, r"`state` must be .*flax.*TrainState.create",
   lambda: faces.step_of(loss, jit=False)(
     train_state.TrainState.create(
       apply_fn=None, params=W, tx=optax.sgd(0.1)), BATCH)),
  ("loss_of_other_arguments", TypeError,
   r"`loss_fn` must take the arguments \(params, model_state, batch, rng\)",
   lambda: fsam_optax.make_train_step(loss)),
  ("model_state_without_its_collection", ValueError,
   r"got nothing\. `TrainState.create` gets it by collection",
   lambda: step(
     lambda p, s, b, r: (loss(p, b), ({"batch_stats": s}, {})),
     model_state={"mean": jnp.ones(2)})),
  ("dynamic_scale_that_is_none", TypeError, "`dynamic_scale` must be a flax",
   lambda: train_state_of(dynamic_scale=True)),
  ("gradients_of_one_pass", ValueError, "`perturbation_state`.*make_train_step",
   lambda: train_state_of().apply_gradients(grads=W)),
  ("metadata_without_a_handler", ValueError, "Create the manager with",
   lambda: checkpoint.check(None, train_state_of())),
  ("dropout_without_a_key", TypeError, "`rng` of the train state is None",
   lambda: step(lambda p, s, b, r: (jax.random.normal(r), (s, {})))),
  # The options.
  ("no_micro_batches", ValueError, "`num_microbatches` must be at least 1",
   lambda: passes(num_microbatches=0)),
  ("every_zero_of_numpy", ValueError, "`every` must be at least 1",
   lambda: passes(every=np.int64(0))),
  ("every_true", TypeError, "`every` must be an int",
   lambda: passes(every=True)),
  ("negative_start", ValueError, "`start` must be at least 0",
   lambda: step(start=-1)),
  ("stop_before_start", ValueError, "`stop` must not be below `start`, got 4",
   lambda: passes(start=5, stop=4)),
  ("gate_without_a_count", ValueError, "`perturbation` must count",
   lambda: passes(perturbation=optax.scale(0.1), every=2)),
  ("string_for_sync", TypeError, "`sync_perturbation` must be a bool",
   lambda: passes(sync_perturbation="no")),
  ("group_that_is_no_axis", ValueError,
   r"`sync_perturbation` must name axes out of `axis_name`.*'b'",
   lambda: step(axis_name="a", sync_perturbation="b")),
  ("unknown_ema_gradient", ValueError, "`ema_gradient` must be",
   lambda: step(ema_gradient="g")),
  ("fraction_of_a_string", TypeError, "`ascent_fraction` must be a real number",
   lambda: step(ascent_fraction="x")),
  ("fraction_of_a_row", ValueError, "`ascent_fraction` must",
   lambda: passes(ascent_fraction=0.3)),
  ("extra_args_of_a_string", TypeError, "`extra_args` must be a collection",
   lambda: step(extra_args="heat")),
  ("no_fraction", ValueError, r"`ascent_fraction` must be in \(0, 1\], got 0",
   lambda: step(ascent_fraction=0)),
  ("no_batch_to_split", ValueError, "`batch` must hold .* got no array. It is",
   lambda: fsam_optax.value_and_grad(
     lambda p: loss(p, BATCH), fsam_optax.sam_perturbation(),
     num_microbatches=2)(W, fsam_optax.sam_perturbation().init(W))),
  ("leaf_that_is_no_array", TypeError, r"\['activation'\].*eqx.is_inexact",
   lambda: fsam_optax.value_and_grad(loss, fsam_optax.sam_perturbation())(
     {**W, "activation": jnp.tanh}, fsam_optax.sam_perturbation().init(W),
     BATCH)),
  ("weight_that_is_missing", TypeError, "weight 'tokens'.*got nothing",
   lambda: passes(lambda p, b: (loss(p, b), {}), has_aux=True,
                  weight="tokens")),
  ("weight_per_row", TypeError, r"weight 'tokens'.*got float32\[2\]",
   lambda: passes(lambda p, b: (loss(p, b), {"tokens": jnp.ones(2)}),
                  has_aux=True, weight="tokens")),
  # Axes, meshes and groups.
  ("unbound_axis_of_a_link", ValueError, "`axis_name` must be an axis",
   lambda: chain(tx=fsam_optax.fsam(axis_name="batch"), grad_fn=grad_fn)),
  ("unbound_axis", ValueError, r"`axis_name`.* got 'batch'.*Wrap",
   lambda: step(axis_name="batch")),
  ("axis_of_a_number", TypeError, "`axis_name` must be the name",
   lambda: step(axis_name=3)),
  ("axis_of_another_mesh", ValueError, "`axis_name` must name axes of.*rows",
   lambda: sharding.BatchFeeder(make_mesh(), "rows")),
  ("no_axis_of_a_mesh", ValueError, "`axis_name` must name axes of.*got None",
   lambda: sharding.BatchFeeder(make_mesh(), None)),
  ("rows_for_a_mesh", ValueError, "evenly over 8 .* got 27 rows .* 3 of them",
   lambda: sharding.BatchFeeder(make_mesh())(batch_of(27))),
  ("rows_of_another_number", ValueError, "`batch`.*shapes of the first.*16",
   lambda: [*map(sharding.BatchFeeder(make_mesh()), map(batch_of, (8, 16)))]),
  ("integer_metric_of_replicas", TypeError, r"floating scalars.*count",
   lambda: sharding.group_step(
     fsam_optax.make_train_step(
       lambda p, s, b, r: (loss(p, b), (s, {"count": 4})),
       axis_name="batch", jit=False), 2)(train_state_of(), BATCH)),
  ("groups_of_an_explicit_axis", ValueError, "must not lie along an explicit a",
   lambda: sharding.group_step(step_of_replicas(), 8)(
     train_state_of(),
     sharding.BatchFeeder(make_mesh("Explicit"))(batch_of(8)))),
  ("traced_radii", ValueError, r"`rho` must be a real .* shape \(2,\)",
   lambda: jax.eval_shape(fsam_optax.friendly_perturbation, jnp.ones(2))),
  ("traced_radius_of_a_schedule", ValueError, r"`rho` must be .* shape \(1,\)",
   lambda: passes(perturbation=fsam_optax.friendly_perturbation(
     lambda count: jnp.full(1, 0.1) * count))),
  ("no_groups", ValueError, "`num_groups`",
   lambda: sharding.group_step(loss, 0)),
  ("step_that_averages_over_no_axis", ValueError,
   "`step` must average over the axes",
   lambda: sharding.shard_map_step(
     faces.step_of(loss, jit=False), make_mesh(), check_vma=False)),
  ("gated_step_that_averages_over_no_axis", ValueError,
   "`step` must average over the axes",
   lambda: sharding.shard_map_step(
     faces.step_of(loss, every=2), make_mesh(), check_vma=False)),
  ("no_axis", ValueError, "`axis_name` must name at least one axis",
   lambda: fsam_optax.fsam(axis_name=())),
  ("groups_of_a_step_over_no_axis", ValueError,
   "axis_name='group', jit=False",
   lambda: sharding.group_step(faces.step_of(loss, jit=False), 2, "group")),
  # NNX.
  ("nnx_unknown_option", TypeError, "`rows` must be one of",
   lambda: nnx_fn(rows=2)),
  ("nnx_without_a_batch", ValueError, "got no array. It is the first argum",
   lambda: nnx_fn(num_microbatches=2)),
  ("nnx_vector_loss", TypeError, r"real scalar, got float32\[3",
   lambda: nnx_fn(False, lambda m: m.weights["w"][...])),
  ("nnx_another_model", ValueError,
   "`perturbation_state` must be that .*ema/.*the model that it was made",
   lambda: nnx_fn(model=nnx.Linear(3, 2, rngs=nnx.Rngs(0)))),
  ("nnx_optimizer_of_no_parameters", ValueError, "`wrt` must select Variables",
   lambda: fsam_optax.nnx.Optimizer(
     nnx.Dropout(0.5, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param,
     perturbation=fsam_optax.friendly_perturbation())),
  ("nnx_method_for_a_loss", ValueError,
   "`loss_fn` must take the model as its first argument",
   lambda: nnx_fn(False, nnx.Linear(3, 2, rngs=nnx.Rngs(0)).__call__)),
  # The optimizer's momentum for the average.
  ("scheduled_decay_of_a_momentum", ValueError,
   "`lmbda` must be the decay of the optimizer's momentum",
   lambda: momentum_for_average(lmbda=lambda count: 0.9)),
  ("momentum_that_forgets_nothing", ValueError, "a number below 1, got 1.0",
   lambda: momentum_for_average(lmbda=1.0)),
  ("dtype_of_a_momentum", ValueError, "`accumulator_dtype` must be None",
   lambda: momentum_for_average(accumulator_dtype="bfloat16")),
  ("unknown_average", ValueError, "must be 'own' or 'optimizer', got 'mo",
   lambda: momentum_for_average("momentum")),
  ("momentum_not_handed_over", ValueError, "`optimizer_state` must be given",
   lambda: passes(perturbation=momentum_for_average())),
  # What is no perturbation or no loss.
  ("perturbation_is_a_number", TypeError, "`perturbation` must be",
   lambda: fsam_optax.value_and_grad(loss, 0.05)),
  ("loss_is_not_callable", TypeError, "`loss_fn` must be callable",
   lambda: fsam_optax.value_and_grad(
     0.0, fsam_optax.sam_perturbation())),
  ("nnx_loss_is_not_callable", TypeError, "`loss_fn` must be callable",
   lambda: nnx_fn(loss_fn=3)),
  ("perturbation_with_fsam_itself", TypeError, "asks for `grad_fn`",
   lambda: passes(perturbation=fsam_optax.fsam())),
  ("state_with_a_radius", TypeError, "`perturbation` .*got 0.05",
   lambda: faces.state_of(W, 0.05)),
  # The chain.
  ("missing_params", ValueError, "`params` must be given",
   lambda: chain(params=None, grad_fn=grad_fn)),
  ("params_with_more_than_the_gradient", ValueError,
   "the structure and shapes of `params`, with .* at tanh, got nothing",
   lambda: chain(params={**W, "tanh": jnp.tanh}, grad_fn=grad_fn)),
  ("gradients_of_single_rows", ValueError, r"`params`, .*got shape \[8, ",
   lambda: fsam_optax.fsam().update(
     {"w": jnp.ones((8, 3))}, fsam_optax.fsam().init(W), W,
     grad_fn=grad_fn)),
  ("params_in_another_container", ValueError, r"PyTreeDef.*, got PyTreeDef",
   lambda: chain(params=collections.OrderedDict(W), grad_fn=grad_fn)),
  ("grad_fn_of_another_structure", ValueError, "of the structure, shapes",
   lambda: chain(grad_fn=lambda p: p["w"])),
  ("grad_fn_of_another_dtype", ValueError, "with float32.*, got bfloat16",
   lambda: chain(grad_fn=lambda p: {"w": p["w"].astype(jnp.bfloat16)})),
  ("grad_fn_of_another_shape_where_paths_look_alike", ValueError,
   r"with float32\[2\] at a/b, got float32\[3\]",
   lambda: fsam_optax.fsam().update(
     ALIKE, fsam_optax.fsam().init(ALIKE), ALIKE,
     grad_fn=lambda p: {**p, "a/b": jnp.ones(3)})),
  ("grad_fn_not_callable", TypeError, "`grad_fn` must be callable",
   lambda: chain(grad_fn=W)),
  ("adaptive_without_params", ValueError, "`params` must be given",
   lambda: fsam_optax.scale_to_radius(0.1, adaptive=True).update(
     W, fsam_optax.scale_to_radius(0.1).init(W))),
  # Masks and schedules.
  ("mask_of_another_structure", ValueError, "`mask` must have the structure",
   lambda: masked_init({"v": True})),
  ("mask_that_excludes_everything", ValueError, "`mask` must select at least",
   lambda: masked_init({"w": False})),
  ("mask_of_strings", TypeError, "`mask` must hold bools",
   lambda: masked_init(lambda p: {"w": "yes"})),
  ("pattern_that_does_not_parse", ValueError, "`pattern` must be a regular",
   lambda: masks.by_path("(")),
  ("radius_of_a_constant_rate", TypeError, "`learning_rate` must be a schedule",
   lambda: radius(0.1, 0.0, 1.0, learning_rate_max=1.0)),
  ("radius_between_equal_rates", ValueError, "`learning_rate_max` must be abo",
   lambda: radius(lambda t: t, 0.0, 1.0, learning_rate_max=0.0)),
  ("negative_smallest_radius", ValueError, "`rho_min` must be non-negative",
   lambda: radius(lambda t: t, -0.1, 1.0, learning_rate_max=1.0)),
  ("unknown_order", ValueError, "`order` must be 'official' or 'paper', got 'O",
   lambda: fsam_optax.fsam(order="Official")),
  ("negative_eta", ValueError, "`eta` must be non-negative",
   lambda: fsam_optax.scale_to_radius(0.1, eta=-1.0)),
  ("radius_of_a_variable", TypeError, "`rho` must be a real number or a sched",
   lambda: fsam_optax.fsam(nnx.Param(0.1))),
  ("optimizer_for_a_radius", TypeError, r"got an optimizer.*chain\(fsam",
   lambda: fsam_optax.fsam(optax.sgd(0.1))),
]  # fmt: skip


@pytest.mark.parametrize(
  ("error", "message", "call"),
  [case[1:] for case in CASES],
  ids=[case[0] for case in CASES],
)
def test_bad_input_is_refused(error, message, call):
  with pytest.raises(error, match=message):
    call()

"""The two passes in a Flax NNX loop.

:class:`Optimizer` takes the second gradient itself. :func:`value_and_grad`
returns the ``grad_fn`` for a chain with :func:`fsam_optax.fsam`.
"""

import dataclasses
import functools
from typing import Any, Callable, Optional, Union, Unpack

from flax import nnx
import jax
from jax import numpy as jnp
import optax

from fsam_optax._fsam import difference
from fsam_optax._loss import check_loss
from fsam_optax._loss import check_loss_fn
from fsam_optax._loss import loss_and_aux
from fsam_optax._optimizer_average import check_optimizer_average
from fsam_optax._options import Options
from fsam_optax._options import PassOptions
from fsam_optax._perturbation import OVERWRITTEN
from fsam_optax._perturbation import ScaleToRadiusState
from fsam_optax._perturbation import check_perturbation
from fsam_optax._perturbed_weights import find_state
from fsam_optax._trees import PyTree
from fsam_optax._two_passes import two_passes
from fsam_optax._versions import Node
from fsam_optax._versions import as_pure


class Optimizer(nnx.Optimizer):
  """An :class:`flax.nnx.Optimizer` that takes both passes.

  The loop changes in two places: where the optimizer is made, and where
  :meth:`value_and_grad` takes the gradient.

  The first pass, at the parameters, gives the loss and changes the model as
  :func:`flax.nnx.value_and_grad` would: BatchNorm's statistics, the counts of
  the rngs, Variables that the forward creates or pops, arrays, static
  attributes and parameters that it sets. The second pass starts from the same
  statistics and counts, so it draws the same dropout mask. It gives its
  gradient, and changes nothing.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> optimizer = fsam_optax.nnx.Optimizer(
    ...   model,
    ...   optax.sgd(0.1),
    ...   perturbation=fsam_optax.friendly_perturbation(rho=0.05),
    ...   wrt=nnx.Param,
    ... )
    >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    >>> x = jnp.eye(2)
    >>> loss, grads = optimizer.value_and_grad(loss_fn)(model, x)
    >>> _ = optimizer.update(model, grads)
    >>> print(bool(loss_fn(model, x) < loss))
    True

  Attributes:
    perturbation: transformation from gradients to perturbations (static);
      None trains with the base optimizer alone, one gradient a step.
    perturbation_state: its state, with a Variable in place of each array, so
      that ``nnx.jit``, ``nnx.split`` and checkpoints carry it.
    took_pass: whether :meth:`value_and_grad` ran since the last ``update``
      (static). Graphs do not differ by it: ``nnx.cond`` may update or not, and
      :meth:`update` looks at it only where a step is traced.
    differentiated: filter of the Variables to differentiate by, ``wrt`` as it
      was given (static). The attribute ``wrt`` leaves out the Variables that
      Flax overwrites with their gradient (fp8): :meth:`update` overwrites
      those, and ``tx`` does not see them.
    step: see :class:`flax.nnx.Optimizer`, as are ``tx``, ``opt_state`` and
      ``wrt``.
  """

  def __init__(
    self,
    model: Any,
    tx: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter,
    perturbation: Optional[optax.GradientTransformation],
  ):
    """Initializes the states of the optimizer and of the perturbation.

    Args:
      model: an NNX module, or another graph node.
      tx: the base optimizer, without :func:`fsam_optax.fsam` in its chain,
        because :meth:`value_and_grad` takes the second gradient.
      wrt: filter of the Variables to train, usually ``nnx.Param``.
      perturbation: such as :func:`fsam_optax.friendly_perturbation`; None for
        the base optimizer alone. Its ``mask`` is a tree like
        ``nnx.as_pure(nnx.state(model, wrt))``, or a callable that gets such a
        ``nnx.State``, at first with Variables: one by names is
        :func:`fsam_optax.masks.by_path`.

    Raises:
      TypeError: if ``perturbation`` is not a gradient transformation, or needs
        ``grad_fn``.
      ValueError: if ``wrt`` selects no Variable of ``model``, or the
        perturbation has ``average="optimizer"`` and the momentum of ``tx`` is
        missing, ambiguous, of scaled gradients or of another decay.
    """
    _check_selects(wrt, model)
    perturbation_state = None
    if perturbation is not None:
      check_perturbation(perturbation)
      params = _marked(nnx.state(model, wrt))
      check_optimizer_average(perturbation, tx, as_pure(params))
      # With the Variables, so that the state gets their sharding.
      perturbation_state = _to_opt_state(perturbation.init(params))
    # Variables that Flax overwrites are differentiated, but are no weights.
    self.differentiated = wrt
    if jax.tree.leaves(nnx.state(model, nnx.All(wrt, _is_overwritten))):
      wrt = nnx.All(wrt, nnx.Not(_is_overwritten))
    super().__init__(model, tx, wrt=wrt)
    self.perturbation = perturbation
    self.took_pass = _Flag(False)
    self.perturbation_state = nnx.data(perturbation_state)

  def value_and_grad(
    self,
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    return_info: bool = False,
    **options: Unpack[PassOptions],
  ) -> Callable[..., Any]:
    """Value at the parameters, gradient at the perturbed parameters.

    It takes the place of :func:`flax.nnx.value_and_grad`.

    Args:
      loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss, a real
        scalar, or with ``has_aux`` the pair ``(loss, aux)``.
      has_aux: whether ``loss_fn`` returns auxiliary data beside the loss.
      return_info: whether to return the :class:`fsam_optax.SharpnessInfo`, too.
      **options: see :class:`~fsam_optax._options.PassOptions`. The batch that
        ``num_microbatches`` and ``ascent_fraction`` split is the first argument
        after the model, a tree of arrays. The model's arrays and Variables that
        are not trained pass from one micro-batch to the next; nothing else of
        the model may change there. With ``axis_name`` the values that the
        forward changes are averaged, except keys; an integer must agree on all
        replicas. The gates count the perturbation's updates as steps, or read
        the optimizer's ``step`` if it counts none.

    Returns:
      A function ``fn(model, *args, **kwargs)`` that returns ``(value,
      grads)``, or with ``return_info`` the triple ``(value, grads, info)``.
      ``value`` is the loss, or ``(loss, aux)``, of the first pass, and
      ``grads`` the ``nnx.State`` that ``update`` takes. A call changes
      ``model``, the modules, rngs and metrics among the other arguments, and
      the perturbation's state: one call a step.

    Raises:
      TypeError: if an option is unknown, or an argument of a wrong type; at
        call, if the loss is not a real scalar or ``loss_fn`` does not return a
        pair with ``has_aux``.
      ValueError: if an option is out of its range, or ``loss_fn`` is a method
        of a module; at call, if the parameters of ``model`` have another
        structure or other shapes than the optimizer's, if the aux holds a
        module that was given, with micro-batches if the loss changes more of
        the model than its values, and as
        :func:`fsam_optax.value_and_grad`.
    """
    chosen = Options.from_keywords(options)
    _check_unbound(loss_fn)

    def fn(model, *args, **kwargs):
      # Without an option that splits rows, no argument is a batch.
      batch, rest = None, args
      if chosen.splits_rows:
        batch, *rest = args or (None,)
      parts = chosen.num_microbatches
      wrt = self.differentiated
      call = _Call(loss_fn, has_aux, wrt, model, rest, kwargs, parts)
      loss_of_part = lambda params, part, index, graph: call.loss_fn(
        params, graph, *((part,) if chosen.splits_rows and args else ())
      )
      state: PyTree = as_pure(self.perturbation_state)
      radius_state = find_state(ScaleToRadiusState, state)
      # `step` stays at 0 in a loop with an update of its own.
      step = self.step[...].astype(jnp.int32)
      updates = step if radius_state is None else radius_state.count
      outcome = two_passes(
        self.perturbation,
        chosen,
        loss_of_part,
        call.params,
        state,
        batch,
        call.graph,
        step=updates,
        optimizer_state=as_pure(self.opt_state),
        optimizer_steps=jnp.where(step > 0, step, updates),
      )
      # First, because the loss may have taken this optimizer as it was.
      value = call.finish(outcome.loss, outcome.aux, outcome.carry)
      if self.perturbation is not None:
        # In a tuple: the whole state may be one Variable.
        advanced = nnx.state((outcome.advance(),))
        nnx.update((self.perturbation_state,), advanced)
      self.took_pass = _Flag(True)
      grads = call.as_variables(outcome.grads)
      return (value, grads, outcome.info) if return_info else (value, grads)

    return nnx.update_context(_TAG)(fn)

  def update(self, model: Any, grads: PyTree, /, **kwargs: Any) -> Any:
    """Updates the parameters by gradients of :meth:`value_and_grad`.

    Args:
      model: the one that the optimizer was made for.
      grads: the gradients of :meth:`value_and_grad`, or the loop's clipped or
        averaged ones.
      **kwargs: keyword arguments of the update of ``tx``.

    Returns:
      What the update of :class:`flax.nnx.Optimizer` does.

    Raises:
      ValueError: if the optimizer has a perturbation and
        :meth:`value_and_grad` did not run since the last update, as in a loop
        that calls ``nnx.value_and_grad``.
    """
    if self.perturbation is not None and not self.took_pass:
      raise ValueError(
        "`grads` must come from `optimizer.value_and_grad(loss_fn)(model, "
        "...)`, which takes both passes, got an update without one since the "
        "last. Call it in place of `nnx.value_and_grad`; `perturbation=None` "
        "trains without F-SAM."
      )
    trained = grads
    if self.wrt is not self.differentiated:
      nnx.update(model, nnx.state(grads, _is_overwritten))
      trained = nnx.state(grads, self.wrt)
    updates: Any = super().update(model, trained, **kwargs)
    self.took_pass = _Flag(False)
    return updates


class _Flag:
  """A truth by which graphs do not differ, in branches or for a cache."""

  def __init__(self, is_set: bool) -> None:
    self._is_set = is_set

  def __bool__(self) -> bool:
    return self._is_set

  def __repr__(self) -> str:
    return f"{self._is_set}"

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Flag) or other == self._is_set

  def __hash__(self) -> int:
    return 0


def value_and_grad(
  loss_fn: Callable[..., Any],
  *,
  has_aux: bool = False,
  wrt: nnx.filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, nnx.State, Callable[[PyTree], PyTree]]]:
  """Value and gradient, and the ``grad_fn`` that a chain with F-SAM needs.

  It is for a loop with :func:`fsam_optax.fsam` in the chain of its
  :class:`flax.nnx.Optimizer`. Other loops use :class:`Optimizer`.

  Examples:
    >>> import fsam_optax, jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    >>> tx = optax.chain(fsam_optax.fsam(rho=0.05), optax.sgd(0.1))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    >>> loss_fn = lambda model, x: jnp.mean((model(x) - 1) ** 2)
    >>> x = jnp.eye(2)
    >>> fn = fsam_optax.nnx.value_and_grad(loss_fn)
    >>> loss, grads, grad_fn = fn(model, x)
    >>> _ = optimizer.update(model, grads, grad_fn=grad_fn)
    >>> print(bool(loss_fn(model, x) < loss))
    True

  Args:
    loss_fn: ``loss_fn(model, *args, **kwargs)`` returns the loss, a real
      scalar, or with ``has_aux`` the pair ``(loss, aux)``.
    has_aux: whether ``loss_fn`` returns auxiliary data beside the loss.
    wrt: filter of the Variables to differentiate by, that of the optimizer.

  Returns:
    A function ``fn(model, *args, **kwargs)`` that returns ``(value, grads,
    grad_fn)``, the first two as :func:`flax.nnx.value_and_grad` does, and
    changes its arguments as that does. ``grad_fn`` takes the parameters as a
    pure ``nnx.State`` and returns their gradient for the same arguments,
    statistics and dropout mask. It changes nothing.

  Raises:
    TypeError: if ``loss_fn`` is not callable; at call, if it does not return a
      pair with ``has_aux``, or the loss is not a real scalar.
    ValueError: if ``loss_fn`` is a method of a module; at call, if ``wrt``
      selects no Variable of the model, or one that Flax overwrites (fp8), or
      the aux holds a module that was given.
  """
  _check_unbound(loss_fn)

  def fn(model, *args, **kwargs):
    _check_selects(wrt, model)
    if jax.tree.leaves(nnx.state(model, nnx.All(wrt, _is_overwritten))):
      raise ValueError(
        "`wrt` must leave out what Flax overwrites with its gradient (fp8), "
        f"got {wrt!r}: a chain gets arrays, and would perturb these, too. Use "
        "`fsam_optax.nnx.Optimizer` with the same `wrt`."
      )
    call = _Call(loss_fn, has_aux, wrt, model, args, kwargs)
    (loss, (graph, aux)), grads = jax.value_and_grad(
      call.loss_fn, has_aux=True
    )(call.params, call.graph)
    value = call.finish(loss, aux, graph)
    moved = as_pure(nnx.state(model, wrt))

    def grad_fn(params):
      # An optimizer perturbs the parameters after the forward, which may have
      # changed one. The loss is that of the parameters before it.
      params = jax.tree.map(
        lambda perturbed, before, after: (
          perturbed if after is before else before + (perturbed - after)
        ),
        params,
        call.params,
        moved,
      )
      return jax.grad(call.loss)(params)

    return value, call.as_variables(grads), grad_fn

  return nnx.update_context(_TAG)(fn)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["leaves"],
  meta_fields=["graphdef", "structure", "sources"],
)
@dataclasses.dataclass
class _Graph:
  """A model and the nodes among the arguments, at one moment of a call."""

  leaves: dict[str, jax.Array]  # By path, the arrays that were not given.
  graphdef: nnx.GraphDef  # The nodes without their arrays.
  structure: Any  # Of the `nnx.State` with its Variables.
  # For each of its arrays the index among those given, or the path in `leaves`.
  sources: tuple[Union[int, str], ...]

  @classmethod
  def of(
    cls, graphdef: nnx.GraphDef, state: PyTree, given: list[Any]
  ) -> "_Graph":
    """The graph of ``nnx.split``, without the arrays in `given`."""
    arrays, structure = jax.tree_util.tree_flatten_with_path(state)
    # By identity: a loss that changes a Variable puts another array into it.
    indices = {id(x): i for i, x in enumerate(given)}
    leaves, sources = {}, []
    for path, x in arrays:
      source = indices.get(id(x))
      if source is None:
        source = jax.tree_util.keystr(path)
        leaves[source] = x
      sources.append(source)
    return cls(leaves, graphdef, structure, tuple(sources))

  def state(self, given: list[Any]) -> PyTree:
    """The ``nnx.State``, from the given arrays and its own."""
    arrays = [
      self.leaves[i] if isinstance(i, str) else given[i] for i in self.sources
    ]
    return jax.tree.unflatten(self.structure, arrays)


class _Call:
  """One call of a loss, split into pure functions and arrays.

  Like a transformation of NNX, it must recognize the caller's objects in the
  graph after the loss. So a call runs inside ``nnx.update_context(_TAG)`` until
  it is finished.
  """

  def __init__(self, loss_fn, has_aux, wrt, model, args, kwargs, parts=1):
    self._loss_fn = loss_fn
    self._has_aux = has_aux
    self._has_parts = parts > 1
    # The nodes among the arguments alone: a loss cannot change an array.
    self._arguments, self._structure = jax.tree.flatten(
      (args, kwargs), is_leaf=_is_node
    )
    # Together, because model and arguments may share a node, such as an Rngs.
    nodes = {
      "model": model,
      # NNX sorts the names: what both hold has its path in the model.
      "others": list(filter(_is_node, self._arguments)),
    }
    selects = nnx.filterlib.to_predicate(wrt)
    with nnx.split_context(_TAG) as context:
      self._graphdef, params, others = context.split(
        nodes,
        lambda path, x: path[0] == "model" and selects(path[1:], x),
        ...,
      )
    self._params = params["model"] if params else params
    # By the paths of the model. Arrays, because `finish` changes the Variables.
    self.params = as_pure(_marked(self._params))
    # Marks, because another Variable may hold the same array.
    marks = [object() for _ in jax.tree.leaves(params)]
    marked = jax.tree.unflatten(jax.tree.structure(params), marks)
    # The rest of the model and the arguments, before the call.
    self.graph = _Graph.of(
      self._graphdef.with_same_outer_index(),
      nnx.merge_state(marked, others),
      marks,
    )

  def loss_fn(self, params, graph, *batch):
    """The loss, the graph after it, and its aux."""
    given = jax.tree.leaves(params)
    with nnx.merge_context(_TAG, inner=True) as context:
      nodes = context.merge(self._graphdef, graph.state(given))
    loss, aux = self._run(nodes, batch)
    with nnx.split_context(_TAG) as context:
      graphdef, state = context.split(nodes)
    if self._has_parts:
      left = _Graph.of(graphdef, state, given)
      _check_same_graph(graph, left)
    else:
      left = _Graph.of(graphdef, state, given + jax.tree.leaves(graph.leaves))
    return loss, (left, aux)

  def loss(self, params):
    """The loss alone; also after `finish`."""
    state = self.graph.state(jax.tree.leaves(params))
    return self._run(nnx.merge(self._graphdef, state), ())[0]

  def finish(self, loss, aux, graph):
    """Changes the nodes of the caller, and returns the value of the loss."""
    given = jax.tree.leaves(self.params)
    if not self._has_parts:
      given += jax.tree.leaves(self.graph.leaves)
    state = graph.state(given)
    with nnx.merge_context(_TAG, inner=False) as context:
      context.merge(graph.graphdef, state)
    return (loss, aux) if self._has_aux else loss

  def as_variables(self, grads):
    """The gradient as Variables, for the filter of an optimizer."""
    return jax.tree.unflatten(
      jax.tree.structure(self._params), jax.tree.leaves(grads)
    )

  def _run(self, nodes, batch):
    moved = iter(nodes["others"])
    args, kwargs = jax.tree.unflatten(
      self._structure,
      [next(moved) if _is_node(x) else x for x in self._arguments],
    )
    given = {id(x) for _, x in nnx.iter_graph(nodes)}
    output = self._loss_fn(nodes["model"], *batch, *args, **kwargs)
    loss, aux = loss_and_aux(output, self._has_aux)
    check_loss(loss)
    is_given = lambda x: isinstance(x, Node) and id(x) in given
    for node in filter(is_given, jax.tree.leaves(aux, is_leaf=is_given)):
      raise ValueError(
        "`loss_fn` must return nothing of the model beside the loss but its "
        f"arrays, got a {type(node).__name__}, of which a copy would come "
        "back. Leave it out: the call changes the caller's own."
      )
    return loss, aux


_TAG = "fsam_optax"


def _is_overwritten(path, x):
  """Whether Flax overwrites this Variable with its "gradient"."""
  del path
  if any(kind.__name__ == OVERWRITTEN for kind in type(x).__mro__):
    return True
  try:  # The type that is registered for the collection.
    return isinstance(x, nnx.variable_type_from_name(OVERWRITTEN))
  except ValueError:
    return False


def _marked(state):
  """The state, with the key `OVERWRITTEN` above what Flax overwrites."""
  return jax.tree.map(
    lambda x: {OVERWRITTEN: x} if _is_overwritten((), x) else x,
    state,
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )


def _to_opt_state(tree):
  """The state with the optimizer's Variables in place of the model's."""
  is_variable = lambda x: isinstance(x, nnx.Variable)

  def of_leaf(x):
    # Flax 0.11 raises for a Variable that a mask has left empty.
    if is_variable(x) and not jax.tree.leaves(x):
      return nnx.optimizer.OptVariable(as_pure(x), **x.get_metadata())
    return nnx.optimizer.to_opt_state(x)

  return jax.tree.map(of_leaf, tree, is_leaf=is_variable)


def _is_node(x):
  return isinstance(x, (Node, nnx.Variable))


def _check_selects(wrt, model):
  """Raises unless the filter selects a Variable of the model."""
  if not jax.tree.leaves(nnx.state(model, wrt)):
    raise ValueError(
      f"`wrt` must select Variables of `model`, got the filter {wrt!r}, which "
      f"selects none of {type(model).__name__}. Give the module that holds "
      "the parameters, or the type of its Variables."
    )


def _check_unbound(loss_fn):
  """Raises for a bound method, whose module would get no gradient."""
  check_loss_fn(loss_fn)
  if isinstance(getattr(loss_fn, "__self__", None), nnx.Module):
    raise ValueError(
      "`loss_fn` must take the model as its first argument, got the method "
      f"{loss_fn.__qualname__} bound to one. Pass "
      "`lambda model, *args: model.method(*args)`."
    )


def _check_same_graph(before, after):
  """Raises where a micro-batch changes more of the model than values."""
  static = before.graphdef.attributes, after.graphdef.attributes
  changed = [x[0] for x, y in zip(*static, strict=False) if x != y]
  if differing := difference(before.leaves, after.leaves):
    changed = [differing]
  elif jax.tree.structure(before) == jax.tree.structure(after):
    return
  raise ValueError(
    "`loss_fn` must change no more than the values of untrained Variables and "
    "arrays of the model with `num_microbatches`, got a change of "
    f"{[*changed, 'its structure'][0]}. Create or pop Variables outside of the "
    "loss, give `nnx.remat` and `nnx.jit` in it graph_updates=False, or do not "
    "split the batch."
  )

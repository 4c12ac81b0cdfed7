"""Many devices: placing a state, feeding batches, mapping a step over a mesh.

Placing and feeding change no number of a step. A step of
:func:`fsam_optax.make_train_step` runs over sharded arrays as it is. With an
``axis_name`` it runs inside :func:`jax.pmap`, :func:`jax.shard_map` or
:func:`jax.vmap`.

.. note::
  On the CPU, wait for each step by :func:`jax.block_until_ready`. With many
  steps in flight and several processes of several devices, the collectives can
  wait for each other forever.
"""

import hashlib
import json
from typing import Any, Callable, Optional

import jax
from jax import numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from fsam_optax._fsam import AxisName
from fsam_optax._fsam import axes_of
from fsam_optax._fsam import shape_and_dtype
from fsam_optax._options import check_int
from fsam_optax._train_state import TrainState
from fsam_optax._train_state import without_aliases
from fsam_optax._trees import PyTree
from fsam_optax._trees import joined_path
from fsam_optax._trees import leaves_by_path

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
Rule = Callable[[str, Any], PartitionSpec]


def fsdp_rule(
  mesh: Mesh, axis_name: AxisName = "batch", min_size: int = 2**12
) -> Rule:
  """A rule for :func:`place_state`: every large array split over the devices.

  Parameters, moving average and optimizer state then take 1 / N of their memory
  on each of N devices, as in fully sharded data parallelism (FSDP, ZeRO).

  Args:
    mesh: the mesh.
    axis_name: its axis, or axes. An axis of 256 devices divides the dimensions
      of few arrays; two axes of 16 divide those of nearly every array.
    min_size: arrays with fewer elements are replicated.

  Returns:
    A rule that splits, for each axis in turn, the largest dimension that the
    axis divides. Where it divides none, the array is replicated along it.

  Raises:
    ValueError: if the mesh has no such axis.
  """
  axes = _axes_on(mesh, axis_name)

  def rule(path, leaf):
    del path
    left = list(jnp.shape(leaf))
    if np.prod(left) < min_size:
      return PartitionSpec()
    split: list[tuple[str, ...]] = [()] * len(left)
    for axis in axes:
      number = mesh.shape[axis]
      fits = [i for i, size in enumerate(left) if size % number == 0]
      if fits:
        chosen = max(fits, key=lambda i: left[i])
        split[chosen] += (axis,)
        left[chosen] //= number
    return PartitionSpec(*(names or None for names in split))

  return rule


def place_state(
  state: PyTree, mesh: Mesh, rule: Optional[Rule] = None
) -> PyTree:
  """Puts a train state on the devices of a mesh.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp, optax
    >>> from fsam_optax import sharding
    >>> state = fsam_optax.TrainState.create(
    ...   apply_fn=None,
    ...   params={"w": jnp.zeros((8, 2))},
    ...   tx=optax.sgd(0.1),
    ...   perturbation=fsam_optax.friendly_perturbation(rho=0.05),
    ... )
    >>> mesh = jax.sharding.Mesh(jax.devices(), "batch")
    >>> state = sharding.place_state(state, mesh)

  Args:
    state: a :class:`fsam_optax.TrainState` or another tree of arrays, with the
      same values in every process. Its arrays may become the placed ones.
    mesh: from :func:`jax.make_mesh`.
    rule: ``rule(path, leaf)`` returns the :class:`jax.sharding.PartitionSpec`
      of an array, as a rule of :func:`fsdp_rule` does. ``path`` is a string
      such as ``"params/Dense_0/kernel"``; the paths of the optimizer's momentum
      and of the moving average end alike. None replicates everything.

  Returns:
    The state, each array a global one over all devices of the mesh.

  Raises:
    ValueError: if the values are not the same in every process.
  """

  def sharding_of(path, leaf):
    spec = PartitionSpec() if rule is None else rule(joined_path(path), leaf)
    return NamedSharding(mesh, spec)

  state = without_aliases(state)
  shardings = jax.tree_util.tree_map_with_path(sharding_of, state)
  if jax.process_count() == 1:
    return jax.device_put(state, shardings)
  # Replicas with other first values would train other models.
  _check_agreement(
    "state",
    {path: _value(x) for path, x in leaves_by_path(state)},
    "Create it with one seed in all of them, or restore one checkpoint.",
  )
  return jax.tree.map(_place, state, shardings)


class BatchFeeder:
  """Turns each process's rows into one global batch, split over the devices.

  Examples:
    >>> import jax, numpy as np
    >>> from fsam_optax import sharding
    >>> mesh = jax.sharding.Mesh(jax.devices(), "batch")
    >>> feed = sharding.BatchFeeder(mesh)
    >>> batch = feed({"x": np.ones((4 * jax.device_count(), 3))})

  A feeder takes batches of one shape. At the first batch the processes compare
  their shapes, and a later batch of another shape is an error, because
  processes that compile different programs wait for each other forever.
  """

  def __init__(self, mesh: Mesh, axis_name: AxisName = "batch"):
    """Initializes the feeder.

    Args:
      mesh: the mesh.
      axis_name: its axis, or axes, along which the rows are split.

    Raises:
      ValueError: if the mesh has no such axis, or processes share rows.
    """
    axes = _axes_on(mesh, axis_name)
    self._sharding = NamedSharding(mesh, PartitionSpec(axes))
    self._replicas = int(np.prod([mesh.shape[axis] for axis in axes]))
    parts = self._sharding.addressable_devices_indices_map((self._replicas,))
    own = len({str(part) for part in parts.values()})
    if own * jax.process_count() != self._replicas:
      raise ValueError(
        "`mesh` must give every process rows of its own along `axis_name`, got "
        f"{own} of {self._replicas} parts in each of {jax.process_count()} "
        "processes. Make it of all processes' devices, its other axes within a "
        "process; or give processes that share rows the same ones by "
        "`jax.make_array_from_process_local_data`."
      )
    self._shapes = None

  def __call__(self, batch: PyTree) -> PyTree:
    """Places a batch.

    Args:
      batch: a tree of arrays with this process's rows, shape ``[B, ...]``. The
        global batch has the rows of all processes, in their order.

    Returns:
      The tree with global arrays.

    Raises:
      ValueError: if the global batch does not split evenly over the devices, or
        if the shapes differ between processes or from those of the first batch.
    """
    shapes = {path: shape_and_dtype(x) for path, x in leaves_by_path(batch)}
    if self._shapes is None:
      _check_agreement("batch", shapes, "Give every process as many rows.")
      _check_rows(batch, self._replicas, jax.process_count())
      self._shapes = shapes
    elif shapes != self._shapes:
      raise ValueError(
        f"`batch` must have the shapes of the first one, {self._shapes}, got "
        f"{shapes}. Drop or pad the last rows of an epoch; use another feeder "
        "for evaluation."
      )
    return jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(
        self._sharding, np.asarray(x)
      ),
      batch,
    )


def shard_map_step(
  step: Step,
  mesh: Mesh,
  axis_name: AxisName = "batch",
  *,
  check_vma: bool = True,
) -> Step:
  """A step on every device of a mesh, by :func:`jax.shard_map`.

  Examples:
    >>> import fsam_optax, jax, jax.numpy as jnp
    >>> from fsam_optax import sharding
    >>> loss_fn = lambda params, model_state, batch, rng: (
    ...   jnp.mean((batch @ params) ** 2), (model_state, {})
    ... )
    >>> mesh = jax.sharding.Mesh(jax.devices(), "batch")
    >>> step = fsam_optax.make_train_step(loss_fn, axis_name="batch", jit=False)
    >>> step = sharding.shard_map_step(step, mesh)

  Args:
    step: from ``make_train_step(loss_fn, axis_name=axis_name, jit=False)``.
    mesh: the mesh that the state is placed on, replicated along ``axis_name``.
    axis_name: axis, or axes, of the mesh along which the batch is split.
    check_vma: whether JAX checks that the outputs are the same on all replicas.

  Returns:
    A compiled function ``step(state, batch)`` that donates the state. The batch
    is global, as :class:`BatchFeeder` returns it.

  Raises:
    ValueError: if the mesh has no such axis, or the step does not average over
      it.
  """
  axes = _axes_on(mesh, axis_name)
  _check_averages(step, axes)
  return jax.jit(
    jax.shard_map(
      step,
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec(axes)),
      out_specs=PartitionSpec(),
      check_vma=check_vma,
    ),
    donate_argnums=0,
  )


def group_step(step: Step, num_groups: int, axis_name: str = "batch") -> Step:
  """A step whose batch ascends in groups, by :func:`jax.vmap`.

  It does on any number of devices what N devices do. With
  ``sync_perturbation=False`` each group of B / ``num_groups`` successive rows
  ascends along its own gradient (m-sharpness). Under :func:`jax.jit` over a
  mesh of Auto axes, groups that each have the rows of one device ascend without
  communication.

  Args:
    step: from ``make_train_step(loss_fn, axis_name=axis_name, jit=False)``.
    num_groups: number of groups, a divisor of the number of rows.
    axis_name: the axis name of the step.

  Returns:
    A pure function ``step(state, batch)``, to be compiled by
    ``jax.jit(..., donate_argnums=0)``. The gradients of all groups are in
    memory at once.

  Raises:
    TypeError: if ``num_groups`` is not an int.
    ValueError: if it is not positive, or the step does not average over the
      axis; at call, if it does not divide the rows, or these lie along an
      explicit axis of a mesh.
  """
  check_int("num_groups", num_groups, least=1)
  _check_averages(step, (axis_name,))
  mapped = jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name=axis_name)

  def call(state, batch):
    _check_rows(batch, num_groups, 1)
    arrays = [x for x in jax.tree.leaves(batch) if isinstance(x, jax.Array)]
    axes = {jax.typeof(x).sharding.spec[:1] for x in arrays}
    if axes - {(None,), ()}:
      raise ValueError(
        "`batch` must not lie along an explicit axis of a mesh, which "
        f"`jax.vmap` cannot average over, got {axes}. Make the mesh by "
        "`jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,))`."
      )
    rows_of = lambda x: jnp.reshape(
      x, (num_groups, len(x) // num_groups, *jnp.shape(x)[1:])
    )
    return mapped(state, jax.tree.map(rows_of, batch))

  return call


def _place(x, sharding):
  """Places an array that each process has on the devices of all processes."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return jax.device_put(x, sharding)
  x = jnp.asarray(x)
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    # A key is replicated, whatever the rule says.
    data = _place(
      jax.random.key_data(x), NamedSharding(sharding.mesh, PartitionSpec())
    )
    wrap = lambda data: jax.random.wrap_key_data(
      data, impl=jax.random.key_impl(x)
    )
    return jax.jit(wrap, out_shardings=sharding)(data)
  local = np.asarray(x)
  return jax.make_array_from_callback(
    local.shape, sharding, lambda index: local[index]
  )


def _value(x):
  """An array of this process as text: ``float32[3], digest 1f2e3d4c``."""
  if isinstance(x, jax.Array):
    if not x.is_fully_addressable:
      return "an array of several processes"
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
  digest = hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
  return f"{shape_and_dtype(x)}, digest {digest[:16]}"


def _check_agreement(name, described, remedy):
  """Raises unless all processes describe an argument alike, by path.

  All processes raise, because a process that went on alone would wait forever.
  """
  if jax.process_count() == 1:
    return
  text = np.frombuffer(json.dumps(described).encode(), np.uint8)
  # A collective needs one size in every process.
  longest = multihost_utils.process_allgather(np.array(len(text))).max()
  filled = np.pad(text, (0, longest - len(text)), constant_values=ord(" "))
  texts = multihost_utils.process_allgather(filled)
  first, *others = [json.loads(bytes(text)) for text in texts]
  for process, other in enumerate(others, start=1):
    for path in [*first, *other]:
      if other.get(path) != first.get(path):
        raise ValueError(
          f"`{name}` must be alike in every process, got at {path} "
          f"{other.get(path, 'nothing')} in process {process} for "
          f"{first.get(path, 'nothing')} in process 0. {remedy}"
        )


def _check_rows(batch, replicas, processes):
  for path, x in leaves_by_path(batch):
    rows = processes * jnp.shape(x)[0] if jnp.ndim(x) else 0
    if rows == 0 or rows % replicas:
      got = f"{rows} rows" if jnp.ndim(x) else "a scalar"
      remedy = (
        f" Drop {rows % replicas} of them, or add {-rows % replicas}."
        if rows
        else ""
      )
      raise ValueError(
        f"`batch` must split evenly over {replicas} devices or groups, got "
        f"{got} at {path}.{remedy}"
      )


def _axes_on(mesh, axis_name):
  axes = axes_of("axis_name", axis_name)
  if not axes or set(axes) - set(mesh.axis_names):
    raise ValueError(
      f"`axis_name` must name axes of the mesh, {mesh.axis_names}, got "
      f"{axis_name!r}. Give the name of an axis of it; the default is 'batch'."
    )
  return axes


def _check_averages(step, axes):
  """Raises for a train step that does not average over its replicas."""
  named = getattr(step, "axes", axes)  # Another function has no `axes`.
  if left := [axis for axis in axes if axis not in named]:
    raise ValueError(
      f"`step` must average over the axes {axes} that its batch is split "
      f"along, got one that leaves out {left}. Make it by `make_train_step("
      f"loss_fn, axis_name={axes if axes[1:] else axes[0]!r}, jit=False)`."
    )

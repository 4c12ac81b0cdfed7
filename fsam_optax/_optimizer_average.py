"""Checks that an optimizer's momentum is the average that F-SAM expects.

The user gives the decay of the momentum twice, to the optimizer and as `lmbda`.
If the two differ, the direction of the ascent is wrong, without an error. So
the optimizer takes two updates, by a gradient and by twice that. The decay
follows from its momentum, and `lmbda` from the averages that the perturbation
computes.
"""

import jax
from jax import core
from jax import numpy as jnp
import optax

from fsam_optax._perturbation import SubtractGradientEmaState
from fsam_optax._perturbation import is_overwritten
from fsam_optax._perturbation import momenta_by_path
from fsam_optax._perturbed_weights import find_state
from fsam_optax._perturbed_weights import is_of_optimizer

# So small that no optimizer clips it, and a power of two, without rounding.
_GRADIENT = 2.0**-20
_MOST_CALLS = 256  # For two updates of an optimizer that accumulates gradients.


def check_optimizer_average(
  perturbation: optax.GradientTransformation,
  tx: optax.GradientTransformation,
  params: optax.Params,
) -> None:
  """Raises if the momentum of `tx` is not the average of its gradients.

  Each perturbed parameter needs one momentum, of gradients that are not scaled,
  with the decay ``lmbda``. The last two are left out for an optimizer that
  cannot run on parameters of one number, as with a mask by size, or that needs
  more arguments, and the check for parameters with a collection for fp8.
  """
  state = jax.eval_shape(perturbation.init, params)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  if not is_of_optimizer(find_state(SubtractGradientEmaState, state)) or any(
    map(is_overwritten, paths)
  ):
    return
  try:
    opt_state = jax.eval_shape(tx.init, params)
  except Exception:
    return
  # An error where a parameter has no momentum.
  average = lambda x, state: _average(perturbation, x, state, 1)
  jax.eval_shape(average, params, opt_state)
  # Concrete values, also inside a traced function.
  with jax.ensure_compile_time_eval():
    small = jax.tree.map(lambda x: jnp.zeros((1,) * jnp.ndim(x)), params)
    try:
      opt_states = _after_two_updates(tx, small)
      averages = [
        _average(perturbation, small, opt_state, count)
        for count, opt_state in enumerate(opt_states, start=1)
      ]
    except Exception:
      return
    is_traced = any(
      isinstance(x, core.Tracer) for x in jax.tree.leaves(averages)
    )
    if len(opt_states) == 2 and not is_traced:  # A traced `lmbda` is traced.
      for name in averages[0]:
        momenta = [momenta_by_path(state)[name] for state in opt_states]
        _check_one(name, momenta, [average[name] for average in averages])


def _check_one(name, momenta, averages):
  """Checks the two momenta of one parameter, and the averages from them."""
  (first, second), source = momenta, momenta[0].source
  finfo = jnp.finfo(first.value.dtype)
  rounding = 1e-4 + 2 * float(finfo.eps)
  # In float16 the gradient is too small to tell.
  rounding += float(finfo.smallest_subnormal) / max(
    float(first.value.sum()), 1e-30
  )
  # The momentum grows by a factor of 2 + decay, and the average from it by
  # (2 + decay) / (1 + lmbda).
  moved = second.value.sum() / first.value.sum()
  decay = float(moved) - 2
  lmbda = float(moved * averages[0] / averages[1]) - 1
  if 0 <= decay < 1 and abs(decay - lmbda) > rounding:
    raise ValueError(
      "`lmbda` must be the decay of the optimizer's momentum with "
      f"average='optimizer', got {lmbda:.4g} for {decay:.4g} of {source} at "
      f"{name or 'the root'}. Give `lmbda={decay:.4g}` to the perturbation if "
      "that is the decay of all groups of the optimizer. Otherwise put links "
      "that change the gradients behind the momentum, or take average='own'."
    )
  scale = float(averages[0]) / _GRADIENT
  if abs(scale - 1) > rounding:
    raise ValueError(
      "`tx` must keep the momentum of the gradients as they are with "
      f"average='optimizer', got one in {source} of {scale:.3g} times the "
      f"gradients at {name or 'the root'}. Put the link that changes them "
      "behind the momentum, or take average='own'."
    )


def _after_two_updates(tx, params):
  """The optimizer's states after one update and after two.

  It is the first state alone where the optimizer does not move so, or where its
  momentum is traced.
  """
  gradient = jax.tree.map(lambda x: jnp.full_like(x, _GRADIENT), params)
  update = optax.with_extra_args_support(tx).update
  states = [last := tx.init(params)]
  if find_state(optax.MultiStepsState, last) is not None:
    # An update takes several calls, each of which would be compiled.
    update = jax.jit(update)
  for _ in range(_MOST_CALLS):
    # Another gradient, so that a momentum of decay 0 moves as well.
    given = optax.tree.scale(float(len(states)), gradient)
    _, last = update(given, last, params, value=jnp.zeros([]))
    if _values(last) != _values(states[-1]):
      states.append(last)
    if len(states) == 3:
      return states[1:]
  return states[:1]


def _values(opt_state):
  """The momenta that are not traced, as numbers."""
  momenta = [x.value for x in momenta_by_path(opt_state).values()]
  return [float(x.sum()) for x in momenta if not isinstance(x, core.Tracer)]


def _average(perturbation, params, opt_state, count):
  """The average that the perturbation computes, by the parameter's path."""
  averages = []
  gradient = jax.tree.map(lambda x: jnp.full_like(x, _GRADIENT), params)
  optax.with_extra_args_support(perturbation).update(
    gradient,
    perturbation.init(params),
    params,
    optimizer_state=opt_state,
    optimizer_steps=count,
    averages=averages,
  )
  return {
    jax.tree_util.keystr(path): x.sum()
    for average in averages  # One for each group of parameters.
    for path, x in jax.tree_util.tree_leaves_with_path(average)
  }

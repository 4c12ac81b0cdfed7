"""Signatures as the source has them, where aliases have their names.

Python keeps what an alias stands for, which for ``optax.ScalarOrSchedule`` is
four lines of types.
"""

import ast
import inspect
import textwrap


def _as_written(app, what, name, value, options, signature, annotation):
  del app, name, options, signature, annotation
  if what == "class":
    value = vars(value).get("__init__")
  value = getattr(value, "__func__", value)
  if not inspect.isfunction(value):
    return None
  try:
    tree = ast.parse(textwrap.dedent(inspect.getsource(value))).body[0]
  except OSError:  # Of a dataclass, made when it was defined.
    return None
  if not isinstance(tree, ast.FunctionDef):
    return None
  arguments = tree.args
  if arguments.args and arguments.args[0].arg in ("self", "cls"):
    del arguments.args[0]
  returns = ast.unparse(tree.returns) if tree.returns else None
  if what == "class" or returns == "None":
    returns = None
  return f"({ast.unparse(arguments)})", returns


def setup(app):
  """Registers the hook of autodoc."""
  app.connect("autodoc-process-signature", _as_written)
  return {"parallel_read_safe": True, "parallel_write_safe": True}

"""How the documentation is built: ``python -m sphinx -W docs docs/_build``."""

import pathlib
import re
import sys

from pygments import lexer
from pygments import token

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS / "_extensions"))

import fsam_optax  # noqa: E402

# Sphinx reads what lies below this folder; readers look at the top level.
for notebook in sorted((DOCS.parent / "notebooks").glob("*.ipynb")):
  copy = DOCS / "notebooks" / notebook.name
  copy.parent.mkdir(exist_ok=True)
  text = notebook.read_text().replace("](../docs/", "](../")
  if not copy.exists() or copy.read_text() != text:
    copy.write_text(text)

project = "fsam_optax"
author = "The fsam_optax authors"
project_copyright = author
release = version = fsam_optax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "sphinx_copybutton",
  "mathml",
  "measured",
  "signatures",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
html_math_renderer = "mathml"

# What a page points at must be there. The names of other libraries are not
# looked up, because that would need their sites while this one is built.
nitpicky = True
nitpick_ignore_regex = [
  (r"py:.*", r"(?!fsam_optax).*"),
  (r"py:.*", r"fsam_optax\._.*"),
]

# The notebooks hold their outputs, which a test compares with a fresh run. The
# pages that draw a figure of their own are run when the site is built.
nb_execution_mode = "force"
nb_execution_excludepatterns = ["notebooks/*"]
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_maximum_signature_line_length = 60
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = True
# Where a public name is explained: a page of its own, or that of its module.
autosummary_context = {
  "guides": {
    "fsam": "guides/optax",
    "sharpness_aware": "guides/own_perturbation",
    "friendly_perturbation": "guides/hyperparameters",
    "sam_perturbation": "algorithm",
    "subtract_gradient_ema": "algorithm",
    "scale_to_radius": "guides/own_perturbation",
    "radius_schedule": "guides/hyperparameters",
    "SubtractGradientEmaState": "algorithm",
    "ScaleToRadiusState": "algorithm",
    "value_and_grad": "guides/optax",
    "SharpnessInfo": "guides/hyperparameters",
    "make_train_step": "guides/linen",
    "TrainState": "guides/linen",
    "nnx": "guides/nnx",
    "masks": "guides/masks",
    "sharding": "guides/devices",
    "checkpoint": "guides/checkpoints",
    "sharpness": "guides/measuring",
  }
}
templates_path = ["_templates"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

# A prompt is not copied, nor what a diff takes out, nor its signs (.gp).
copybutton_exclude = ".linenos, .gd, .gp"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"fsam_optax {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


class Diff(lexer.RegexLexer):
  """A diff whose signs are tokens of their own, so that they are not copied."""

  name = "diff"
  tokens = {  # noqa: RUF012
    "root": [
      (r"-.*\n", token.Generic.Deleted),
      (
        r"(\+)(.*\n)",
        lexer.bygroups(token.Generic.Prompt, token.Generic.Inserted),
      ),
      (r"( ?)(.*\n)", lexer.bygroups(token.Generic.Prompt, token.Text)),
    ]
  }


def read_notebooks_here(app, name, source):
  """Links of pages to notebooks lead to their copies below this folder."""
  source[0] = re.sub(r"\]\(\.\./((\.\./)?notebooks/)", r"](\1", source[0])


def setup(app):
  """Registers the lexer, and the rewriting of links to notebooks."""
  app.add_lexer("diff", Diff)
  app.connect("source-read", read_notebooks_here)

"""How the documentation is built: ``python -m sphinx -W docs docs/_build``."""

import pathlib
import sys

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
  "sphinx_copybutton",
  "mathml",
  "measured",
  "public_names",
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

# The notebooks hold their outputs, which a test compares with a fresh run.
nb_execution_mode = "off"
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
templates_path = ["_templates"]
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

# A prompt is not copied.
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

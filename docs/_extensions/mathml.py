"""Mathematics as MathML, converted while the site is built.

Browsers render it by themselves: a page loads no script, no fonts and nothing
from another site for it.
"""

import re

from docutils import nodes
from latex2mathml import converter


def _converted(latex: str, display: str) -> str:
  # Of an aligned column browsers read the style and not the attribute.
  text = re.sub(
    r'<mtd columnalign="(left|right)">',
    r'<mtd style="text-align: \1; padding-inline: 0.1em">',
    converter.convert(latex, display=display),
  )
  # Without a font for mathematics a subscript hangs from the ink of its
  # letter: of one depth, those of d and of g stand level.
  return re.sub(
    r"(<msub>)(<mi>[^<]*</mi>)",
    r'\1<mpadded depth="0.15em">\2</mpadded>',
    text,
  )


def _inline(visitor, node):
  visitor.body.append(_converted(node.astext(), "inline"))
  raise nodes.SkipNode


def _block(visitor, node):
  # Sphinx numbers what has a label; nothing here has one.
  visitor.body.append(
    '<div class="math" role="math" tabindex="0">'
    f"{_converted(node.astext(), 'block')}</div>"
  )
  raise nodes.SkipNode


def setup(app):
  """Registers the renderer, which `html_math_renderer` then names."""
  app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
  return {"parallel_read_safe": True, "parallel_write_safe": True}

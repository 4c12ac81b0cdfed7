"""The directive ``{measured}``: a table of measurements, by its name.

``{measured} study direction 0`` is the first table of that study. The
option ``:without:`` names columns to leave out, separated by semicolons.
"""

from docutils import nodes
from docutils.parsers.rst import directives
import measurements
from sphinx.util.docutils import SphinxDirective


class Measured(SphinxDirective):
  """The directive: the words of its argument name a table."""

  required_arguments = 1
  final_argument_whitespace = True
  option_spec = {"without": directives.unchanged}  # noqa: RUF012

  def run(self):
    """Parses the table as if it had been written on the page."""
    for folder in measurements.FOLDERS:
      for path in (*folder.glob("*.json*"), *folder.glob("*.toml")):
        self.env.note_dependency(str(path))
    without = self.options.get("without", "").split(";")
    titles = [title.strip() for title in without if title.strip()]
    text = measurements.markdown(self.arguments[0], titles)
    # A number stays on the line of its error; lines break before "p =".
    text = [
      line.replace(" ± ", "\u00a0±\u00a0").replace(" = ", "\u00a0=\u00a0")
      for line in text
    ]
    container = nodes.container(classes=["measured"])
    self.state.nested_parse(text, self.content_offset, container)
    return [container]


def setup(app):
  """Registers the directive."""
  app.add_directive("measured", Measured)
  return {"parallel_read_safe": True, "parallel_write_safe": True}

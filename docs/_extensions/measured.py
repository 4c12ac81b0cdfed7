"""The directive ``{measured}``: a table of measurements, by its name.

``{measured} study direction 0`` is the first table of that study.
"""

from docutils import nodes
import measurements
from sphinx.util.docutils import SphinxDirective


class Measured(SphinxDirective):
  """The directive: the words of its argument name a table."""

  required_arguments = 1
  final_argument_whitespace = True

  def run(self):
    """Parses the table as if it had been written on the page."""
    for folder in measurements.FOLDERS:
      for path in (*folder.glob("*.json*"), *folder.glob("*.toml")):
        self.env.note_dependency(str(path))
    text = measurements.markdown(self.arguments[0])
    # A number stays on the line of its error.
    text = [line.replace(" ± ", "\u00a0±\u00a0") for line in text]
    container = nodes.container(classes=["measured"])
    self.state.nested_parse(text, self.content_offset, container)
    return [container]


def setup(app):
  """Registers the directive."""
  app.add_directive("measured", Measured)
  return {"parallel_read_safe": True, "parallel_write_safe": True}

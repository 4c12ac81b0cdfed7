"""Runs the notebooks side by side, before Sphinx reads them one by one.

What ran is in the cache of myst-nb, which then finds it there.
"""

import pathlib

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor
from sphinx.util import logging

logger = logging.getLogger(__name__)


def _run(app):
  if app.config.nb_execution_mode != "cache":
    return
  cache = get_cache(app.config.nb_execution_cache_path)
  notebooks = sorted((pathlib.Path(app.srcdir) / "notebooks").glob("*.ipynb"))
  for path in notebooks:
    cache.add_nb_to_project(str(path))
  waiting = cache.list_unexecuted()
  if not waiting:
    return
  logger.info("running %d notebooks", len(waiting))
  executor = load_executor("local-parallel", cache, logger=logger.logger)
  found = executor.run_and_cache(
    filter_uris=[record.uri for record in waiting],
    timeout=app.config.nb_execution_timeout,
  )
  # Why one failed is said where the page is read, which runs it again.
  for uri in (*found.errored, *found.excepted):
    logger.info("%s did not run", uri)


def setup(app):
  """Runs them once the configuration is read."""
  app.connect("builder-inited", _run)
  return {"parallel_read_safe": True, "parallel_write_safe": True}

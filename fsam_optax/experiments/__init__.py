"""The runnable part: data, networks and the commands of the package.

Rooms, of which each imports only those above it:

- ``common``: flags, files, statistics, tables, figures and progress bars;
- ``data`` and ``networks``: a registry each, and a file an entry;
- ``lab``: many small runs at once: their trainer, search, rows and report;
- ``studies``: a file a question, on ``lab``: ``compare``, ``tune``, ``study``;
- ``train``: one real run, ``train``, which knows nothing of ``lab``.

Nothing of the core imports this, and this imports the core's public names. It
needs the packages of ``pip install -e ".[experiments]"`` in a clone.
"""

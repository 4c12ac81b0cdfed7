"""Every notebook runs from top to bottom, and is stored without output."""

import json
import pathlib
import time

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 60

notebooks = pytest.mark.parametrize(
  "path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS]
)


def test_there_are_notebooks():
  assert NOTEBOOKS


@notebooks
def test_is_stored_without_output(path):
  for cell in json.loads(path.read_text())["cells"]:
    if cell["cell_type"] == "code":
      assert cell["outputs"] == []
      assert cell["execution_count"] is None


@pytest.mark.slow
@notebooks
def test_runs_in_under_a_minute(path):
  notebook = nbformat.read(path, as_version=4)
  client = nbclient.NotebookClient(
    notebook,
    timeout=SECONDS,
    kernel_name="python3",
    # Where the package is, so that the notebook imports this copy.
    resources={"metadata": {"path": str(ROOT)}},
  )
  start = time.perf_counter()
  client.execute()  # Raises what a cell raises.
  seconds = time.perf_counter() - start
  assert all(c.execution_count for c in notebook.cells if c.cell_type == "code")
  assert seconds < SECONDS, f"{path.name} took {seconds:.0f} s."

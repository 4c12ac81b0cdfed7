"""The outputs in the notebooks are those of a fresh run."""

import pathlib

import pytest

nbformat = pytest.importorskip("nbformat", reason="with the extra docs")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def texts(notebook):
  """What each cell prints or shows as text, and how many pictures."""
  return [
    (
      "".join(
        x.get("text", "") or x.get("data", {}).get("text/plain", "")
        for x in cell.outputs
      ),
      sum("image/png" in x.get("data", {}) for x in cell.outputs),
    )
    for cell in notebook.cells
    if cell.cell_type == "code"
  ]


def test_there_are_notebooks():
  assert len(NOTEBOOKS) >= 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_with_what_it_shows(path):
  assert any(text or pictures for text, pictures in texts(read(path)))


def read(path):
  return nbformat.read(path, nbformat.NO_CONVERT)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_fresh_run_shows_the_same(path):
  nbclient = pytest.importorskip("nbclient", reason="with the extra docs")
  stored, fresh = read(path), read(path)
  resources = {"metadata": {"path": str(path.parent)}}
  nbclient.NotebookClient(fresh, timeout=600, resources=resources).execute()
  assert texts(fresh) == texts(stored)

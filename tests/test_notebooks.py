"""The outputs in the notebooks are those of a fresh run.

Their words are, and their numbers as nearly as another processor adds up: a
training makes much of a last bit.
"""

import pathlib
import re

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
  for (text, pictures), (was, were) in zip(
    texts(fresh), texts(stored), strict=True
  ):
    assert pictures == were
    (words, numbers), (stored_words, expected) = map(taken_apart, (text, was))
    assert words == stored_words
    assert numbers == pytest.approx(expected, rel=0.03, abs=0.015), text


NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]\d+)?")


def taken_apart(text):
  """The words of a text, without their spaces, and its numbers."""
  words = [x.strip() for x in NUMBER.split(text)]
  return words, [float(x) for x in NUMBER.findall(text)]

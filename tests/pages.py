"""The code blocks of Markdown pages, to run them as a reader would."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = [
  README,
  *(x for x in sorted(DOCS.glob("**/*.md")) if "_build" not in x.parts),
]


def blocks(path: pathlib.Path) -> list[tuple[str, str]]:
  """The fenced blocks of a page, as pairs of language and text."""
  text = path.read_text()
  return re.findall(r"^```(\S*)[^\n]*\n(.*?)^```$", text, re.M | re.S)


def applied(diff: str, sign: str) -> str:
  """One side of a diff: the lines that are common or have the sign."""
  lines = diff.splitlines()
  assert all(line[:1] in (" ", "-", "+") for line in lines if line)
  return "\n".join(line[1:] for line in lines if line[:1] in (" ", sign))


def run(path: pathlib.Path, sign: str = "+") -> dict[str, object]:
  """What a page defines, run from its top with one side of its diffs."""
  namespace: dict[str, object] = {"__name__": path.stem}
  for number, (language, text) in enumerate(blocks(path)):
    if language == "diff":
      text = applied(text, sign)
    elif language != "python":
      continue
    exec(compile(text, f"{path.name}, block {number}", "exec"), namespace)
  return namespace

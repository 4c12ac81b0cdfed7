"""The built site: its links lead somewhere, and it asks no other site.

Where it is not built the tests are skipped and say so. The gate builds it.
"""

import functools
import html.parser
import pathlib
import re
import urllib.parse

from pages import DOCS
import pytest

SITE = DOCS / "_build" / "html"

pytestmark = pytest.mark.skipif(
  not (SITE / "index.html").exists(),
  reason="NOT CHECKED: docs/_build/html is not built; see CONTRIBUTING.md",
)


class Page(html.parser.HTMLParser):
  """The anchors of a page, its links and what it loads."""

  def __init__(self, path: pathlib.Path):
    super().__init__()
    self.anchors, self.links, self.loads = set(), set(), set()
    self.without_text: list[str] = []
    self.feed(path.read_text(encoding="utf-8"))

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.anchors |= {found[x] for x in ("id", "name") if found.get(x)}
    if tag == "a" and "href" in found:
      self.links.add(found["href"])
    if tag == "link" and found.get("rel") not in ("next", "prev", "canonical"):
      self.loads.add(found.get("href"))
    if tag in ("script", "img", "iframe", "source", "video", "object"):
      self.loads |= {found[x] for x in ("src", "data", "href") if found.get(x)}
    # What stands in for a text that is missing is the address.
    if tag == "img" and found.get("alt", "") in ("", found.get("src")):
      self.without_text.append(found.get("src", ""))


@functools.cache
def pages() -> dict[str, Page]:
  """Every page of the site by its path."""
  return {
    path.relative_to(SITE).as_posix(): Page(path)
    for path in sorted(SITE.rglob("*.html"))
    if "_static" not in path.parts
  }


def is_elsewhere(link: str) -> bool:
  """Whether a link leaves the site."""
  parts = urllib.parse.urlsplit(link)
  return bool(parts.netloc) or parts.scheme not in ("", "http", "https")


def test_every_link_and_anchor_of_the_site_is_there():
  broken = []
  for name, page in pages().items():
    for link in page.links | page.loads:
      if is_elsewhere(link):
        continue
      path, _, anchor = link.partition("#")
      path = urllib.parse.unquote(path.partition("?")[0])
      target = (SITE / name).parent / path if path else SITE / name
      if target.is_dir():
        target /= "index.html"
      if not target.exists():
        broken.append((name, link))
      elif anchor and target.suffix == ".html":
        key = target.resolve().relative_to(SITE.resolve()).as_posix()
        if urllib.parse.unquote(anchor) not in pages()[key].anchors:
          broken.append((name, link))
  assert not broken


def test_nothing_is_loaded_from_another_site():
  for name, page in pages().items():
    outside = [
      x for x in page.loads if is_elsewhere(x) and not x.startswith("data:")
    ]
    assert not outside, name
  for path in SITE.rglob("*.css"):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", text), path


def test_a_page_that_draws_its_figure_shows_it():
  for name in ("algorithm", "commands/augmentation"):
    assert "<img" in (SITE / f"{name}.html").read_text(), name


def test_a_public_name_links_to_its_guide_and_its_source():
  for path in SITE.glob("api/generated/*.html"):
    links = pages()[path.relative_to(SITE).as_posix()].links
    assert any("_modules/fsam_optax" in link for link in links), path.name
    assert "Explained in" in path.read_text(), path.name


def test_every_image_has_an_alternative_text():
  assert not {
    name: page.without_text
    for name, page in pages().items()
    if page.without_text
  }

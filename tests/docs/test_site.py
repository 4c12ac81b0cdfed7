"""The built site: its links lead somewhere, and it asks no other site.

Where the site is not built, or no Chromium is found, the tests are skipped and
say so. The gate builds it first.
"""

import functools
import html
import html.parser
import http.server
import json
import os
import pathlib
import re
import shutil
import subprocess
import threading
import urllib.parse

from pages import DOCS
import pytest

SITE = DOCS / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

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


HARNESS = """<!doctype html><meta charset=utf-8><link rel=icon href="data:,">
<pre id=found>waiting</pre>
<script>
const found = [];
async function open_at(page, width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  const loaded = new Promise(resolve => { frame.onload = resolve; });
  frame.src = page;
  document.body.append(frame);
  await loaded;
  await new Promise(resolve => setTimeout(resolve, 50));
  for (let i = 0; page.includes("?q=") && i < 50; i++) {
    if (frame.contentDocument.querySelector("ul.search li a")) break;
    await new Promise(resolve => setTimeout(resolve, 100));
  }
  const page_of = frame.contentDocument;
  const root = page_of.documentElement;
  const cut = x => x.scrollWidth > x.clientWidth + 1;
  const all = what => [...page_of.querySelectorAll("article " + what)];
  const scrolls_of = table => {
    let number = 0;
    for (let x = table; x.tagName !== "ARTICLE"; x = x.parentElement) {
      const style = frame.contentWindow.getComputedStyle(x).overflowX;
      number += (style === "auto" || style === "scroll") && cut(x);
    }
    return number;
  };
  found.push({page, width, overflow: root.scrollWidth - root.clientWidth,
    hits: frame.contentDocument.querySelectorAll("ul.search li a").length,
    math: frame.contentDocument.querySelectorAll("math").length,
    copy: frame.contentDocument.querySelectorAll("button.copybtn").length,
    code: all("pre").filter(cut).map(x => x.textContent)
      .filter(text => !text.startsWith("python3 -m venv")),
    doubled: all("table").filter(table => scrolls_of(table) > 1).length,
    scrolling: all("table").filter(scrolls_of).length});
  frame.remove();
}
(async () => {
  for (const page of PAGES) for (const width of [390, 1280, 1920])
    await open_at(page, width);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
  """Serves the site and the page that opens its pages; notes what is missing.

  The server has that page as ``harness``, and what is ``missing``.
  """

  def __init__(self, *args, **kwargs):
    super().__init__(*args, directory=str(SITE), **kwargs)

  def do_GET(self):
    if self.path == "/harness.html":
      body = self.server.harness.encode()
      self.send_response(200)
      self.send_header("Content-Type", "text/html")
      self.end_headers()
      self.wfile.write(body)
    else:
      super().do_GET()

  def log_message(self, format, *args):
    del format
    if len(args) > 1 and str(args[1]) == "404":
      self.server.missing.append(str(args[0]))


@pytest.fixture
def server():
  address = ("127.0.0.1", 0)
  with http.server.ThreadingHTTPServer(address, Handler) as server:
    server.missing = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def test_pages_open_in_a_browser_on_a_desktop_and_on_a_phone(server, tmp_path):
  browser = next(filter(None, map(shutil.which, BROWSERS)), None)
  if browser is None:
    pytest.skip("NOT CHECKED: no Chromium is installed to open the site with")
  opened = [
    "index.html",
    "algorithm.html",
    "guides/optax.html",
    "guides/nnx.html",
    "evidence/cifar.html",
    "evidence/fewer_gradients.html",
    "api/core.html",
    "api/generated/fsam_optax.make_train_step.html",
    "notebooks/quickstart.html",
    "search.html?q=radius",
    "search.html?q=bf16",
  ]
  server.harness = HARNESS.replace("PAGES", json.dumps(opened))
  log = tmp_path / "net.json"
  address = f"http://127.0.0.1:{server.server_address[1]}"
  done = subprocess.run(
    [
      *(browser, "--headless=new", "--no-sandbox", "--disable-gpu"),
      *("--disable-background-networking", "--disable-component-update"),
      *("--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"),
      *("--enable-logging=stderr", f"--log-net-log={log}"),
      *("--virtual-time-budget=60000", "--dump-dom"),
      f"{address}/harness.html",
    ],
    capture_output=True,
    text=True,
    timeout=120,
    env={**os.environ, "LANG": "C.UTF-8"},
  )
  report = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
  assert report, done.stderr
  found = json.loads(html.unescape(report[1]))
  assert len(found) == 3 * len(opened)
  assert not [x for x in found if x["overflow"] > 0], "pages scroll sideways"
  assert not [x for x in found if x["width"] > 390 and x["code"]]
  assert not [x for x in found if x["doubled"]], "two scrollbars at a table"
  by_page = {x["page"]: x for x in found}
  assert not by_page["evidence/cifar.html"]["scrolling"]  # At 1920 pixels.
  assert by_page["algorithm.html"]["math"] > 5
  assert by_page["guides/optax.html"]["copy"] > 3
  assert by_page["search.html?q=radius"]["hits"] > 3
  assert by_page["search.html?q=bf16"]["hits"] > 0

  said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
  assert not said, "the console is not silent"
  assert not server.missing
  # Of the pages: the browser itself asks for the time, and for dictionaries.
  asked = {
    match[1]
    for line in log.read_text().splitlines()
    if f'"initiator":"{address}"' in line
    and (match := re.search(r'"url":"((?:http|ws)[^"]*)"', line))
  }
  assert len(asked) > len(opened)
  assert not {url for url in asked if not url.startswith(address)}
